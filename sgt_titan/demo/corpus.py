"""Support chats full of made-up private data: the demo's training and test rows.

Row ``i`` of a seed is a function of ``(seed, i)`` alone, so a row is the same on every machine and any slice can be
made without the rows before it. Only ``random.Random(str).random()`` is drawn from, which Python promises to keep
stable across versions; ``choice`` and ``shuffle`` carry no such promise.

Nothing in a row belongs to anybody: surnames and streets are made of syllables, card numbers fail the Luhn check,
phone numbers use the unassigned area code 555, mail addresses use the reserved example domains.

Every answer repeats values of its prompt (name, last four digits, order number, city ...) and gives the help that
belongs to the prompt's problem, so a trunk that cannot read the prompt answers badly.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from sgt_titan.errors import UserError

T = TypeVar("T")

# Share of rows with a system message, and with a second user turn.
SYSTEM_SHARE = 0.25
FOLLOW_UP_SHARE = 0.3

# Kind of each private placeholder; a placeholder that is absent here is not private.
KINDS = {
    "name": "name",
    "first": "name",
    "card": "card",
    "last4": "card",
    "phone": "phone",
    "new_phone": "phone",
    "street": "address",
    "new_street": "address",
    "city": "city",
    "new_city": "city",
    "email": "email",
    "born": "birth_date",
    "diagnosis": "diagnosis",
    "medication": "medication",
    "order": "order",
    "amount": "amount",
}


def words(text: str) -> tuple[str, ...]:
    """The words of a list kept as prose, which reads better here than one quoted word a line."""
    return tuple(text.split())


FIRST_NAMES = words(
    "Aaron Abigail Adele Agnes Albert Alice Amara Amir Andre Anita Anton Astrid Basil Beatrice Bella Boris Bruno "
    "Carla Carmen Cecil Celia Clara Conrad Cyril Dalia Daniel Daphne Diana Dmitri Doris Edgar Edith Elena Elias Ella "
    "Emil Esther Ethan Eva Farah Felix Fiona Flora Frank Freya George Gina Gloria Grace Greta Hanna Harold Hassan "
    "Hector Heidi Helen Hugo Ida Igor Imran Ines Irene Isaac Ivan Ivy Jamal Janet Jasper Joan Jonas Judith Julia Karim "
    "Karl Keiko Kenji Lara Laura Leila Leo Linda Louis Lucia Luke Mabel Magnus Mara Marco Maria Martin Maya Milan "
    "Mona Nadia Naomi Nelson Nina Noah Nora Oleg Olga Oscar Otto Paula Pedro Petra Philip Priya Rachel Ralph Ramon "
    "Rita Robert Rosa Ruben Ruth Salma Samuel Sarah Simon Sofia Stefan Tamara Tara Theo Tomas Ursula Vera Victor Wanda "
    "Walter Yusuf Yvonne Zara Zoe"
)
SURNAME_HEADS = words(
    "Al Bar Bel Bren Cal Cor Dal Dor El Fal Fen Gar Gor Hal Har Hol Jar Kel Kor Lam Lin Mal Mar Mer Mor Nel Nor Ol Or "
    "Pel Per Quin Ral Ros Sal Sel Sor Tal Ter Tor Ul Val Ver Vol Wal Wen Yar Zel"
)
SURNAME_MIDDLES = ("", *words("a be da de di en ga i ka la li ma ni o ra ta vi"))
SURNAME_TAILS = words(
    "berg bach court dale don dorf feld ford gate gren hart ham kin land ley man mere mont nov quist rick sen shaw ski "
    "son stein stone ton vale vik ville ward well wick wood worth"
)
STREET_TYPES = ("Street", "Road", "Lane", "Avenue", "Court", "Drive", "Square", "Terrace")
CITIES = words(
    "Aldermoor Ashport Bellhaven Birchton Blackmere Bramford Brightwell Calder Carrowby Castlebay Coldwater Cranfield "
    "Dunmore Eastvale Elmstead Fairhaven Falconridge Farleigh Foxbury Glenholm Goldcrest Granton Greyhaven Hallowbrook "
    "Harwick Hazelwood Highcliff Holmbridge Ironbridge Kestrelby Kingsmere Larkfield Lindenau Littlehampton Longreach "
    "Maplewood Marlow Millbrook Northgate Oakhurst Oldport Pinehurst Queensferry Ravenhill Redcliff Rivermouth "
    "Rockport Rosendale Saltburn Seaford Silverton Southmoor Stonebridge Sunbury Thornfield Tidewater Underhill "
    "Wexcombe Whitby Willowdale Winterbourne Woodstock Yarrow Zellwood"
)
MONTHS = words("January February March April May June July August September October November December")
MAIL_DOMAINS = ("example.com", "example.org", "example.net", "mail.example.com", "post.example.org", "box.example.net")
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"
ITEMS = (
    "a desk lamp",
    "a coffee machine",
    "a pair of boots",
    "a winter coat",
    "a tablet",
    "a garden chair",
    "a set of pans",
    "a headset",
    "a backpack",
    "a vacuum cleaner",
    "a board game",
    "a bookshelf",
)
COMPANIES = (
    "Northwind Stores",
    "Harbour Bank",
    "Lumen Energy",
    "Meadow Clinic",
    "Swift Parcel",
    "Blue Heron Travel",
    "Cedar Insurance",
    "Tandem Mobile",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")

# diagnosis -> (medications, specialist, advice). The answer names specialist and advice, the prompt does not.
CONDITIONS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "asthma": (("salbutamol", "budesonide"), "the lung clinic", "keep your inhaler with you and avoid smoke"),
    "type 2 diabetes": (("metformin", "gliclazide"), "the diabetes team", "check your sugar before each meal"),
    "migraine": (("sumatriptan", "propranolol"), "the headache clinic", "rest in a dark room and note each attack"),
    "high blood pressure": (("lisinopril", "amlodipine"), "the heart clinic", "cut down on salt and measure daily"),
    "eczema": (("hydrocortisone", "tacrolimus"), "the skin clinic", "use plain cream and avoid hot showers"),
    "depression": (("sertraline", "citalopram"), "the mental health team", "do not stop the tablets suddenly"),
    "epilepsy": (("lamotrigine", "valproate"), "the neurology ward", "do not drive until you have been seen"),
    "gout": (("allopurinol", "colchicine"), "the joint clinic", "drink more water and avoid beer"),
    "anaemia": (("ferrous sulphate", "folic acid"), "the blood clinic", "take the iron with orange juice"),
    "hay fever": (("cetirizine", "loratadine"), "the allergy nurse", "keep the windows shut in the morning"),
    "insomnia": (("melatonin", "zopiclone"), "the sleep clinic", "avoid screens and coffee in the evening"),
    "an underactive thyroid": (("levothyroxine", "liothyronine"), "the hormone clinic", "take it before breakfast"),
    "acid reflux": (("omeprazole", "famotidine"), "the stomach clinic", "eat early and raise the head of your bed"),
    "arthritis": (("naproxen", "methotrexate"), "the joint clinic", "keep moving gently and use warm packs"),
    "glaucoma": (("latanoprost", "timolol"), "the eye clinic", "use the drops at the same hour every night"),
    "angina": (("nitroglycerin", "bisoprolol"), "the heart clinic", "stop and rest at the first chest pain"),
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """What may go wrong: ways to say it, and ways to help, which all repeat the same private values."""

    asked: tuple[str, ...]
    answered: tuple[str, ...]


@dataclass(frozen=True)
class Scenario:
    """``details`` carry the private values; one of them and one of ``problems`` make a prompt."""

    details: tuple[str, ...]
    problems: tuple[Problem, ...]


OPENINGS = (
    "Hello, my name is {name}.",
    "Hi, I am {name}.",
    "Good morning, {name} here.",
    "This is {name} speaking.",
    "Dear team, I am {name}.",
    "Hello, {name} is my name.",
)
ASKS = (
    "What should I do?",
    "Please help me.",
    "Can you sort this out?",
    "Could you look into it?",
    "How do we go on from here?",
    "Please tell me the next step.",
)
GREETINGS = ("Thank you, {first}.", "Hello {first}.", "I understand, {first}.")
CLOSINGS = ("", "", "Is there anything else?", "Have a good day.", "We are glad to help.")

SCENARIOS = (
    Scenario(  # bank card
        details=(
            "My card number is {card} and you can reach me on {phone}.",
            "The card is {card}, and I live at {street} in {city}.",
            "I pay with the card {card}, registered to {email}.",
            "It is about card {card}; I was born on {born}.",
        ),
        problems=(
            Problem(
                ("My card was stolen on the train.", "Somebody took my wallet with the card in it."),
                (
                    "I have blocked the card ending in {last4}. Report the theft to the police; a new card comes in "
                    "five days.",
                    "The card ending in {last4} is blocked now. Please go to the police; a new one comes in five days.",
                ),
            ),
            Problem(
                ("I was charged {amount} twice.", "There are two payments of {amount} where one is right."),
                (
                    "I see two payments of {amount} on the card ending in {last4}. The billing team returns one of "
                    "them by {day}.",
                    "The card ending in {last4} shows {amount} twice. Our billing team pays one back by {day}.",
                ),
            ),
            Problem(
                ("I do not recognise a payment of {amount}.", "A payment of {amount} is not mine."),
                (
                    "Our fraud team has opened a dispute over {amount} on the card ending in {last4}. Do not use it "
                    "for now.",
                    "I opened a dispute over {amount} for the card ending in {last4}. Our fraud team writes to you.",
                ),
            ),
            Problem(
                ("The shop says my card is declined.", "My card does not work in any shop."),
                (
                    "The card ending in {last4} was locked after three wrong codes. Unlock it at any cash machine "
                    "with your right code.",
                    "Three wrong codes locked the card ending in {last4}. Enter the right code at a cash machine.",
                ),
            ),
            Problem(
                ("I forgot the PIN of my card.", "I can no longer remember my PIN."),
                (
                    "A new PIN for the card ending in {last4} goes out by post. It comes in a plain letter within "
                    "three days.",
                    "We post a new PIN for the card ending in {last4}. Look for a plain letter within three days.",
                ),
            ),
        ),
    ),
    Scenario(  # parcel
        details=(
            "My order number is {order}, sent to {street} in {city}.",
            "I ordered {item} under number {order} for {street}, {city}.",
            "Order {order} should go to {street} in {city}; my phone is {phone}.",
            "The parcel {order} is for {street}, {city}.",
        ),
        problems=(
            Problem(
                ("It has not arrived and it is a week late.", "I have waited a week longer than promised."),
                (
                    "Order {order} is still in the depot of {city}. The driver brings it on {day}, and delivery is "
                    "free.",
                    "Your parcel {order} is waiting in the {city} depot. It comes on {day} without a delivery fee.",
                ),
            ),
            Problem(
                ("The box was crushed and the content is broken.", "It came broken in a crushed box."),
                (
                    "We replace order {order} at no cost. Keep the box; a driver in {city} collects it on {day}.",
                    "A new parcel replaces {order} for free. Our driver in {city} takes the broken box on {day}.",
                ),
            ),
            Problem(
                ("You sent the wrong thing.", "Something I never ordered was in the box."),
                (
                    "Sorry for the mix-up with order {order}. Print the return label and leave the box at the {city} "
                    "shop.",
                    "We mixed up order {order}. Leave the box at the shop in {city} with the return label.",
                ),
            ),
            Problem(
                ("I will be away, so nobody can open the door.", "Nobody is at home when the driver comes."),
                (
                    "I have moved order {order} to the pick-up point in {city}. Bring an identity card before {day}.",
                    "Order {order} now goes to the pick-up point of {city}. Collect it with an identity card by {day}.",
                ),
            ),
            Problem(
                ("I want to cancel it.", "I no longer need it, please cancel."),
                (
                    "Order {order} to {city} is cancelled. The money is back on your account by {day}.",
                    "I cancelled order {order} to {city}. You have your money back by {day}.",
                ),
            ),
        ),
    ),
    Scenario(  # clinic
        details=(
            "I was born on {born} and have {diagnosis}.",
            "My date of birth is {born}. The doctor found {diagnosis}.",
            "I have {diagnosis}, and my phone is {phone}.",
            "I suffer from {diagnosis} and live in {city}, {street}.",
        ),
        problems=(
            Problem(
                ("Since I take {medication} I feel dizzy.", "The {medication} makes me feel sick."),
                (
                    "With {diagnosis} you should keep taking {medication} until we call. I booked you with {clinic}; "
                    "please {advice}.",
                    "Do not change the {medication} yet. For {diagnosis}, {clinic} will see you; until then {advice}.",
                ),
            ),
            Problem(
                ("I have run out of {medication}.", "I took my last {medication} today."),
                (
                    "A new prescription of {medication} is ready today. With {diagnosis}, {advice}, and ask {clinic} "
                    "if unsure.",
                    "Your {medication} can be collected today. For {diagnosis} {clinic} says: {advice}.",
                ),
            ),
            Problem(
                ("I missed two doses of {medication}.", "I forgot my {medication} for two days."),
                (
                    "Take the next {medication} as usual and never a double dose. With {diagnosis}, {advice}; {clinic} "
                    "can help.",
                    "Never take {medication} twice at once. For {diagnosis} call {clinic}, and {advice}.",
                ),
            ),
            Problem(
                ("My symptoms got worse despite {medication}.", "Even with {medication} it is worse than before."),
                (
                    "If {medication} no longer helps your {diagnosis}, {clinic} should see you on {day}. Please "
                    "{advice}.",
                    "You have a visit at {clinic} on {day}, as {medication} does not help your {diagnosis}. Until "
                    "then {advice}.",
                ),
            ),
        ),
    ),
    Scenario(  # insurance claim
        details=(
            "My policy is {order} and I live at {street}, {city}.",
            "Policy {order}, and my mail is {email}.",
            "I hold policy {order}; call me on {phone}.",
            "I was born on {born} and my policy number is {order}.",
        ),
        problems=(
            Problem(
                ("Water from a burst pipe ruined the kitchen, about {amount}.", "A burst pipe did {amount} of damage."),
                (
                    "Claim {order} over {amount} is with the water damage team. Turn off the main tap and take photos.",
                    "The water damage team has claim {order} over {amount}. Shut the main tap and photograph it all.",
                ),
            ),
            Problem(
                (
                    "A hailstorm damaged my car, {amount} says the garage.",
                    "Hail hit my car and the repair is {amount}.",
                ),
                (
                    "For {order} we cover hail in full. Send us the garage bill of {amount} and keep the car dry.",
                    "Hail is fully covered by {order}. Let the garage send us its bill of {amount}.",
                ),
            ),
            Problem(
                ("Burglars took things worth {amount}.", "There was a break-in, and {amount} of goods are gone."),
                (
                    "For the burglary under {order} we need the police report and a list of the goods worth {amount}.",
                    "Please send the police report and a list of goods worth {amount} for {order}.",
                ),
            ),
            Problem(
                ("You paid {amount} less than agreed.", "The payment was {amount} too low."),
                (
                    "I asked the payments team to check {order}. The missing {amount} is paid on {day} if they agree.",
                    "The payments team checks {order} again and sends the missing {amount} on {day} if it is due.",
                ),
            ),
        ),
    ),
    Scenario(  # mobile phone
        details=(
            "My number is {phone} and my mail is {email}.",
            "It is about the line {phone}; my date of birth is {born}.",
            "The number {phone} is mine and I live in {city}, {street}.",
            "I have the contract for {phone}, order {order}.",
        ),
        problems=(
            Problem(
                ("I have no signal at home.", "There is no network where I live."),
                (
                    "There is a mast fault near you. The line {phone} works again on {day}; use calls over wifi until "
                    "then.",
                    "A mast near you is broken. Use calls over wifi; {phone} has signal again on {day}.",
                ),
            ),
            Problem(
                ("I lost my phone, please stop the line.", "My phone is gone and somebody may call with it."),
                (
                    "The line {phone} is blocked. A new SIM card comes by post, and you keep your number.",
                    "I blocked {phone}. You keep the number and get a new SIM card by post.",
                ),
            ),
            Problem(
                ("My bill is {amount}, far too high.", "I was billed {amount} for calls I never made."),
                (
                    "The {amount} for {phone} comes from roaming abroad. I have capped roaming and credit half of it.",
                    "Roaming abroad caused the {amount} on {phone}. I capped it and credit half.",
                ),
            ),
            Problem(
                ("I want to keep the number at another company.", "I am leaving but want to keep my number."),
                (
                    "You can take {phone} with you. The transfer code goes to you by text and is valid until {day}.",
                    "Yes, {phone} moves with you. You get a transfer code by text, valid until {day}.",
                ),
            ),
        ),
    ),
    Scenario(  # hotel
        details=(
            "I booked a room in {city} under {order}, paid with card {card}.",
            "My booking {order} is for the hotel in {city}; mail me at {email}.",
            "Booking {order}, hotel in {city}, and my phone is {phone}.",
            "The reservation {order} in {city} is mine; I was born on {born}.",
        ),
        problems=(
            Problem(
                ("I shall arrive after midnight.", "My train comes in after midnight."),
                (
                    "The hotel in {city} keeps your room all night. Give the code {order} to the night porter.",
                    "Your room in {city} is kept all night. Tell the night porter the code {order}.",
                ),
            ),
            Problem(
                ("I need a room with a cot for the baby.", "We bring a baby and need a cot."),
                (
                    "A cot is added to {order} at no cost. The hotel in {city} gives you a quiet family room.",
                    "I added a free cot to {order}. You get a quiet family room in {city}.",
                ),
            ),
            Problem(
                ("I am ill and must cancel.", "I cannot travel because I am ill."),
                (
                    "Booking {order} in {city} is cancelled without a fee. Send a note from your doctor by {day}.",
                    "I cancelled {order} in {city} for free. Please send a doctor's note by {day}.",
                ),
            ),
            Problem(
                ("The deposit of {amount} was taken twice.", "You took the deposit of {amount} two times."),
                (
                    "The hotel in {city} returns {amount} for {order} by {day}. It was an error of the front desk.",
                    "For {order} you get {amount} back by {day}. The front desk in {city} made an error.",
                ),
            ),
        ),
    ),
    Scenario(  # energy
        details=(
            "My meter {order} is at {street} in {city}.",
            "I live at {street}, {city}, with the meter {order}.",
            "The account {order} belongs to {street}, {city}; phone {phone}.",
            "For {street} in {city} I have the account {order}.",
        ),
        problems=(
            Problem(
                ("The power has been off since morning.", "We have had no power all day."),
                (
                    "A cable in {city} is damaged. Crews are at work, and meter {order} has power again by tonight.",
                    "Crews repair a damaged cable in {city}. Meter {order} is back on by tonight.",
                ),
            ),
            Problem(
                ("I smell gas in the cellar.", "There is a smell of gas in the house."),
                (
                    "Leave the house in {city} now, touch no switch and call from outside. A gas engineer for {order} "
                    "is coming.",
                    "Touch no switch and leave the house now. A gas engineer for {order} is on the way in {city}.",
                ),
            ),
            Problem(
                ("The bill of {amount} cannot be right.", "You ask for {amount}, twice as much as last year."),
                (
                    "The bill of {amount} for {order} was estimated. Send a photo of the meter, and {city} billing "
                    "corrects it.",
                    "We only estimated {amount} for {order}. With a photo of the meter {city} billing corrects it.",
                ),
            ),
            Problem(
                ("I cannot pay {amount} at once.", "Paying {amount} in one go is too much for me."),
                (
                    "You may pay {amount} for {order} in six parts without interest. The first is due on {day}.",
                    "We split {amount} for {order} into six parts without interest, the first due on {day}.",
                ),
            ),
        ),
    ),
    Scenario(  # online account
        details=(
            "My account uses {email}, and my phone is {phone}.",
            "I sign in with {email}; my date of birth is {born}.",
            "The account {email} is mine, with the card {card}.",
            "You know me as {email}, living at {street} in {city}.",
        ),
        problems=(
            Problem(
                ("I forgot my password.", "My password no longer works."),
                (
                    "I sent a reset link to {email}. It is valid for one hour; choose at least twelve characters.",
                    "A reset link is on its way to {email}, valid for one hour. Use at least twelve characters.",
                ),
            ),
            Problem(
                ("Somebody else signed in to my account.", "I think my account was hacked."),
                (
                    "I have signed out all devices of {email}. Set a new password and turn on the second factor.",
                    "All devices of {email} are signed out. Turn on the second factor and set a new password.",
                ),
            ),
            Problem(
                ("Please delete my account.", "I want all my data erased."),
                (
                    "The account {email} is erased in thirty days. Until then you can undo it by signing in.",
                    "We erase {email} in thirty days. Sign in before that if you want to undo it.",
                ),
            ),
            Problem(
                ("I get too much advertising.", "Stop sending me advertising every day."),
                (
                    "I took {email} off every list. The last advertising may still come this week.",
                    "You will get no more advertising at {email}, at most a last one this week.",
                ),
            ),
        ),
    ),
    Scenario(  # refund
        details=(
            "I bought {item} for {amount}, order {order}.",
            "Order {order} was {item} at {amount}; I live in {city}, {street}.",
            "For {item} I paid {amount} with card {card}, order {order}.",
            "I paid {amount} for {item} under order {order}, mail {email}.",
        ),
        problems=(
            Problem(
                ("It does not fit me.", "It is too small for me."),
                (
                    "You can send back order {order} within a month. We refund {amount} once it is with us.",
                    "Order {order} can be sent back within a month. Then you get {amount} back.",
                ),
            ),
            Problem(
                ("It stopped working after a few days.", "It broke on the second day."),
                (
                    "Order {order} is under warranty. Choose a repair or the full {amount} back by {day}.",
                    "You have a warranty on order {order}. Tell us by {day}: repair, or {amount} back.",
                ),
            ),
            Problem(
                ("Now it is cheaper on your site.", "Today your site sells it for less."),
                (
                    "We match the lower price for {order}. The difference to {amount} comes as a voucher on {day}.",
                    "For {order} you get the difference to {amount} as a voucher on {day}.",
                ),
            ),
            Problem(
                ("I still have no refund.", "The refund has not come yet."),
                (
                    "The refund of {amount} for {order} left us today. Your bank shows it by {day}.",
                    "We sent {amount} for {order} today, and your bank shows it by {day}.",
                ),
            ),
        ),
    ),
    Scenario(  # payroll
        details=(
            "My staff number is {order} and my mail is {email}.",
            "I was born on {born}, staff number {order}.",
            "Staff number {order}; I moved to {street} in {city}.",
            "I work in the {city} office as {order}; phone {phone}.",
        ),
        problems=(
            Problem(
                ("My pay was {amount} short.", "This month {amount} of my pay is missing."),
                (
                    "The pay office found {amount} of overtime missing for {order}. It is paid with an extra run on "
                    "{day}.",
                    "For {order} the overtime of {amount} was missed. The pay office sends it on {day}.",
                ),
            ),
            Problem(
                ("I need a letter about my salary of {amount}.", "My landlord wants proof of my pay of {amount}."),
                (
                    "A signed letter about {amount} for {order} is ready. Collect it from the staff desk on {day}.",
                    "The staff desk has a signed letter for {order} about {amount}. Collect it on {day}.",
                ),
            ),
            Problem(
                ("I paid {amount} for a work trip.", "The work trip cost me {amount}."),
                (
                    "Upload the tickets under {order}, and {amount} comes with the next pay after your manager agrees.",
                    "Once your manager agrees, {amount} comes with the next pay. Upload the tickets under {order}.",
                ),
            ),
        ),
    ),
)

SYSTEMS = (
    "You are the support assistant of {company}.",
    "You answer customers of {company}. Be brief.",
    "{company} support desk. Be polite and exact.",
)

# A second turn: (what the user asks, what the assistant says).
FOLLOW_UPS = (
    (
        ("Thanks. My new phone number is {new_phone}, please note it.", "Please call me on {new_phone} from now on."),
        ("I noted it, {first}. From now on we call you on {new_phone} and delete the old number.",
         "Done. The number {new_phone} is saved as yours, {first}, and the old one is deleted."),
    ),
    (
        ("Please send all of this to {email}.", "Can I have it in writing at {email}?"),
        ("Of course, {first}. A summary goes to {email} within the hour; check the spam folder too.",
         "Yes, {first}. You get a summary at {email} within the hour, so look in the spam folder too."),
    ),
    (
        ("I am moving to {new_street} in {new_city}.", "By the way, my new address is {new_street}, {new_city}."),
        ("Thank you, {first}. I changed your address to {new_street} in {new_city}; letters go there from {day}.",
         "Your address is now {new_street} in {new_city}, {first}. Letters go there from {day}."),
    ),
    (
        ("Will somebody call me on {new_phone} about it?", "Could a person ring me on {new_phone}?"),
        ("Yes, {first}. A colleague rings {new_phone} on {day} between nine and noon.",
         "A colleague will ring you on {new_phone}, {first}, on {day} between nine and noon."),
    ),
)  # fmt: skip


def pick(rng: Random, choices: Sequence[T]) -> T:
    """One element, drawn with ``rng.random()`` only (see the module docstring)."""
    return choices[int(rng.random() * len(choices))]


def digits(rng: Random, count: int) -> str:
    """``count`` decimal digits."""
    return "".join(pick(rng, "0123456789") for _ in range(count))


def luhn_valid(number: str) -> bool:
    """Whether a string of digits passes the Luhn check that every issued payment card passes."""
    doubled = [int(d) * (2 if i % 2 else 1) for i, d in enumerate(reversed(number))]
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


def card_number(rng: Random) -> str:
    """16 digits in groups of four that fail the Luhn check, so that they are nobody's card."""
    body, last = "4" + digits(rng, 14), pick(rng, "0123456789")
    if luhn_valid(body + last):
        last = str((int(last) + 1) % 10)
    number = body + last
    separator = pick(rng, (" ", " ", "-"))
    return separator.join(number[i : i + 4] for i in range(0, 16, 4))


def coined(rng: Random) -> str:
    """A surname or street name made of syllables (about 30,000 of them)."""
    return pick(rng, SURNAME_HEADS) + pick(rng, SURNAME_MIDDLES) + pick(rng, SURNAME_TAILS)


def values(rng: Random) -> dict[str, str]:
    """Every placeholder's value but ``day``. All are drawn for every row: no template moves a draw."""
    first, last = pick(rng, FIRST_NAMES), coined(rng)
    card = card_number(rng)
    diagnosis = pick(rng, tuple(CONDITIONS))
    medications, clinic, advice = CONDITIONS[diagnosis]
    mailbox = pick(rng, ("{f}.{l}", "{l}{n}", "{f}{n}", "{l}.{f}")).format(f=first, l=last, n=digits(rng, 2)).lower()
    return {
        "first": first,
        "name": f"{first} {last}",
        "card": card,
        "last4": card[-4:],
        "phone": f"555-{digits(rng, 3)}-{digits(rng, 4)}",
        "new_phone": f"555-{digits(rng, 3)}-{digits(rng, 4)}",
        "street": f"{1 + int(rng.random() * 199)} {coined(rng)} {pick(rng, STREET_TYPES)}",
        "new_street": f"{1 + int(rng.random() * 199)} {coined(rng)} {pick(rng, STREET_TYPES)}",
        "city": pick(rng, CITIES),
        "new_city": pick(rng, CITIES),
        "email": f"{mailbox}@{pick(rng, MAIL_DOMAINS)}",
        "born": f"{1 + int(rng.random() * 28)} {pick(rng, MONTHS)} {1935 + int(rng.random() * 70)}",
        "diagnosis": diagnosis,
        "medication": pick(rng, medications),
        "clinic": clinic,
        "advice": advice,
        "order": f"{pick(rng, LETTERS)}{pick(rng, LETTERS)}-{digits(rng, 6)}",
        "amount": f"${10 + int(rng.random() * 990)}.{digits(rng, 2)}",
        "item": pick(rng, ITEMS),
        "company": pick(rng, COMPANIES),
    }


def fill(template: str, fields: dict[str, str]) -> tuple[str, list[dict[str, Any]]]:
    """Replaces ``{field}`` in ``template``; returns the text and the spans of its private fields, in order."""
    text, spans = "", []
    for i, part in enumerate(re.split(r"\{(\w+)\}", template)):
        if i % 2 == 0:
            text += part
            continue
        value = fields[part]
        if part in KINDS:
            spans.append({"start": len(text), "end": len(text) + len(value), "kind": KINDS[part], "text": value})
        text += value
    return text, spans


def conversation(seed: int, index: int) -> dict[str, Any]:
    """Row ``index`` of ``seed``; see ``conversations``."""
    rng = Random(f"sgt-titan demo {seed} {index}")
    fields = values(rng)
    scenario = pick(rng, SCENARIOS)
    problem = pick(rng, scenario.problems)
    # A problem has its own day, so that nothing but the prompt decides what a good answer says.
    fields["day"] = DAYS[len(problem.asked[0]) % len(DAYS)]
    body = [pick(rng, scenario.details), pick(rng, problem.asked)]
    prompt = " ".join([pick(rng, OPENINGS), *body, pick(rng, ASKS)])
    answer = " ".join(filter(None, [pick(rng, GREETINGS), pick(rng, problem.answered), pick(rng, CLOSINGS)]))
    turns = [("user", prompt), ("assistant", answer)]
    if rng.random() < SYSTEM_SHARE:
        turns.insert(0, ("system", pick(rng, SYSTEMS)))
    if rng.random() < FOLLOW_UP_SHARE:
        asked, answered = pick(rng, FOLLOW_UPS)
        turns += [("user", pick(rng, asked)), ("assistant", pick(rng, answered))]

    messages, spans = [], []
    for i, (role, template) in enumerate(turns):
        content, found = fill(template, fields)
        messages.append({"role": role, "content": content})
        spans += [{"message": i, **span} for span in found]
    return {"messages": messages, "spans": spans}


def conversations(count: int, seed: int = 0, start: int = 0) -> Iterator[dict[str, Any]]:
    """Rows ``start .. start + count - 1`` of ``seed``.

    A row is ``{"messages": [{"role", "content"}, ...], "spans": [{"message", "start", "end", "kind", "text"}, ...]}``:
    an optional system message, then one or two user turns with their answers. ``spans`` marks every private value in
    user and assistant messages, ordered by message and start: ``messages[message]["content"][start:end] == text``.

    Raises:
        UserError: ``count`` or ``start`` is negative.
    """
    if count < 0 or start < 0:
        raise UserError(f"demo corpus: count and start must be 0 or more, got count={count} and start={start}")
    return (conversation(seed, i) for i in range(start, start + count))


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m sgt_titan.demo.corpus``: writes rows as JSON lines."""
    parser = argparse.ArgumentParser(prog="python -m sgt_titan.demo.corpus", description="Write demo chats as JSONL.")
    parser.add_argument("--count", type=int, required=True, help="rows to write")
    parser.add_argument("--seed", type=int, default=0, help="rows of different seeds differ")
    parser.add_argument("--start", type=int, default=0, help="index of the first row")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args(argv)
    try:
        rows = conversations(args.count, args.seed, args.start)
        with args.out.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
