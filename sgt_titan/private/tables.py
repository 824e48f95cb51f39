"""The words that surrogates are made of. Nothing here may change within a version of the drawing: a conversation that
goes on after an upgrade must find its surrogates again (``VERSION`` is a label of every draw).

First names are those that women and men have, so that a surrogate says nothing of anybody's sex and a "she" in the text
is not wrong. Surnames, places, organisations and domains are made of syllables: they belong to nobody, and there are
enough of them that one is never a value of the text. Hosts and mail domains end in ``.example`` (RFC 2606).
"""

from __future__ import annotations

VERSION = "2"  # 2: amounts that add up still do


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST = words(
    "Addison Alexis Avery Blair Cameron Carey Casey Corey Devin Devon Elliot Emery Finley Harley Hollis Jaime "
    "Jamie Jayden Jessie Jody Jules Kelsey Kendall Kerry Lesley Lindsay Logan Lorin Marley Merritt Micah Morgan "
    "Murphy Nicky Peyton Quinn Reese Regan Remy Riley Rory Rylan Sasha Shannon Shawn Shea Skyler Stacy Sutton "
    "Tatum Taylor Teagan Toby Tracey Tristan Tyler Whitney Yael"
)
HEADS = words(
    "Ab Ald Ar Ash Bal Bar Bel Ber Bran Bren Cal Car Cor Dal Dan Dor Dun El Ever Fal Far Fen Gal Gar Glen Gor "
    "Had Hal Har Hol Kel Ken Kin Lam Lan Lin Lor Mal Mar Mel Mer Mor Nor Ol Or Pel Per Ral Ran Ros Sal Sel Sor "
    "Tal Tan Ter Tor Ul Val Ver Vol Wal Wen Wil Win Yar Zel"
)
MIDDLES = ("", *words("a be da de di en er ga i ka la le li ma ni o ra ta ti vi"))
SURNAME_TAILS = words(
    "berg croft dale den field ford gate gren ham hart hurst ing kin land ley low man mere mont more nell quist "
    "rick sen ser shaw stead stein ston thorn ton vik wald ward well wick win wood worth"
)
PLACE_TAILS = words(
    "borough bourne bridge burn bury by combe cross dale field ford haven holm lea mere minster moor mouth port "
    "stead vale ville wick"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
TITLES = frozenset(
    words(
        "mr mrs ms miss mx dr prof professor sir madam dame lord lady herr frau monsieur madame señor señora sr sra "
        "rev father"
    )
)
ORG_WORDS = frozenset(
    words(
        "academy agency association authority bank bureau college commission committee company corp corporation "
        "council department foundation gmbh group hospital inc inc. institute institution llc llp ltd ltd. limited "
        "ministry office organisation organization partners plc school services society studios systems "
        "technologies trust union university airlines church clinic club museum press"
    )
)

# For finding: words that begin sentences, headings and forms, beyond the thousand of Faker's English list.
ORDINARY = frozenset(
    words(
        "a abstract accountant accounting act address after again ai all already also although am an analysis "
        "analyst and another answer any api appendix application apr april arabic are art as assistant async at aug "
        "august autumn await background baker bank be because been before begin best bible bill billion bishop "
        "black blue bool boolean both bottom brown bsc business but button by can care carter catch catholic "
        "central ceo cfo chapter chase chatgpt chief chinese christian christmas class click client close code "
        "college company conclusion const consultant content context cook coordinator correct could court cover "
        "covid create css cto customer data date dean dear dec december def delete department describe developer "
        "did director diy do doctor does double down dr duke during dutch each east easter eastern education eight "
        "email end engineer english enter error eu even every example examples excel executive experience explain "
        "export faith false faq feb february field figure file files finally finance financial find first five fix "
        "float for ford format four frank french fri friday from function furthermore generate german give god gold "
        "good google gpt grace grand grant gray great green grey group guy had has have he health hello help her "
        "here hey hi hill hindi his holy hope hospital how however hr html http https human hundred i id if import "
        "improve in info input insert int internet interview into introduction is islam islamic it italian its jan "
        "january japanese java javascript jewish job joy json jul july jun june junior just king knight korean lake "
        "last latin law left legal let letter linux list load long lord love lower madam major make management "
        "manager many mar march mark market marketing mason may mba medical menu microsoft might miller million "
        "minor mon monday more moreover most mr mrs ms msc much muslim must my name names new next nine no none "
        "north northern not note notes nov november now null number nurse oct october of off officer ok okay old on "
        "once one online only open openai or order other our out output over own page part patient pc pdf phd phone "
        "php plan please pm polish pope portuguese position president press price prince print product products "
        "prof professor project projects prompt provide public python queen question questions read red report "
        "research response resume return review rewrite rice rich right rivers role rose run russian salary sales "
        "same sat saturday save school second section select self senior sep sept september server service services "
        "seven shall she short should silver since sir six skills so some south southern spanish specialist spring "
        "sql start static step steps still stone stop strategy string student subject such summarise summarize "
        "summary summer sun sunday supervisor system table task teacher team tell ten text than thank thanks that "
        "the their then there therefore these they third this those thousand three throw thu thursday time title to "
        "today tomorrow too top translate true try tue tuesday turkish turner tv two uk un university until up "
        "update upper url us usa use user var very void warning was we web website wed wednesday well were west "
        "western what when where which while white who why will windows winter with without wood word work would "
        "write xml yes yet you young your"
    )
)
PLACES = frozenset(
    [
        "USA",
        "United States",
        "United States of America",
        "UK",
        "United Kingdom",
        "Great Britain",
        "England",
        "Scotland",
        "Wales",
        "Ireland",
        "Europe",
        "Asia",
        "Africa",
        "America",
        "Australia",
        "New York",
        "Los Angeles",
        "Hong Kong",
        "Middle East",
        "Latin America",
        "North America",
        "South America",
        "Russia",
        "Korea",
        "South Korea",
        "North Korea",
        "Vietnam",
        "Iran",
        "Syria",
        "Czech Republic",
        "Saudi Arabia",
        "UAE",
        "Dubai",
        "California",
        "Texas",
        "Florida",
        "Silicon Valley",
        "Wall Street",
        "Bay Area",
        "Yugoslavia",
        "Soviet Union",
        "USSR",
        "Macau",
        "Taiwan",
        "Palestine",
        "Kashmir",
        "Bavaria",
    ]
)
