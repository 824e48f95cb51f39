"""Chat templates that behave as those of known models do, in as few words as show the behaviour."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Llama 3.2: today's date in a system turn of its own; white space stripped.
DATED = (
    "{{ bos_token }}{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|im_start|>system\nToday: {{ date_string }}\n<|im_end|>"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
# Qwen3: thoughts of earlier turns are left out, an answer without any gets empty ones; `enable_thinking: false` closes
# them in the generation prompt. Calls of tools as XML around JSON.
THINKS = (
    "{% if tools %}<|im_start|>system\n# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% set last = namespace(user=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% else %}{% set content = m.content or '' %}{% set thoughts = m.reasoning_content or '' %}"
    "{% if '</think>' in content %}{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n{% if loop.index0 > last.user and (loop.last or thoughts) %}"
    "<think>\n{{ thoughts.strip('\n') }}\n</think>\n\n{% endif %}{{ content }}"
    "{% for call in m.tool_calls or [] %}{% if content or not loop.first %}{{ '\n' }}{% endif %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Qwen3 thinking: the generation prompt opens thoughts, which turns that are over hold, empty ones too.
THINKS_OPENED = THINKS.replace("<think>\n\n</think>\n\n{% endif %}{% endif %}",
                               "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}")  # fmt: skip
# DeepSeek-R1 distilled: thoughts are opened by the generation prompt and cut out of every turn that is over.
OPENS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}"
    "{% elif m.role == 'assistant' %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "<A>{{ content }}{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
# DeepSeek-V3.1: the generation prompt closes thoughts that were never opened, unless `thinking` is true.
CLOSES = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}"
    "{% elif m.role == 'assistant' %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>', 1)[1] %}{% endif %}"
    "<A></think>{{ content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A>"
    "{% if thinking is defined and thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
)
# gpt-oss: an answer names its channel first; thoughts are a message of their own in another one; a call ends otherwise.
CHANNELS = (
    "<|im_start|>system\nCurrent date: {{ strftime_now('%Y-%m-%d') }}<|im_end|>"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}"
    "<|im_start|>assistant analysis: {{ m.thinking }}<|im_end|>{% endif %}"
    "{% if m.tool_calls %}<|im_start|>assistant to={{ m.tool_calls[0].function.name }}: "
    "{{ m.tool_calls[0].function.arguments | tojson }}</s>"
    "{% else %}<|im_start|>assistant final: {{ m.content }}<|im_end|>{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
# Llama 3.1: a turn with a call is the call alone, what tools say is written as JSON.
BARE_CALLS = (
    "{% for m in messages %}{% if m.tool_calls %}<|im_start|>assistant\n\n"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "<|im_end|>{% elif m.role == 'tool' %}<|im_start|>ipython\n\n{{ m.content | tojson }}<|im_end|>"
    "{% else %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
# DeepSeek-V3: the arguments of a call are added to a text; what tools say ends only where an answer follows.
TEXT_CALLS = (
    "{{ bos_token }}{% set was = namespace(tool=false) %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{% set was.tool = true %}<|im_start|>tool {{ m.content }}"
    "{% elif m.role == 'assistant' %}{% if was.tool %}<|im_end|>{% else %}<A>{% endif %}{% set was.tool = false %}"
    "{% if m.tool_calls %}{{ m.content or '' }}{% for call in m.tool_calls %}"
    "{{ '<|im_start|>' + call.type + ' ' + call.function.name + '\n' + call.function.arguments + '<|im_end|>' }}"
    "{% endfor %}{% else %}{{ m.content }}{% endif %}{{ eos_token }}"
    "{% else %}<U>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{% if was.tool %}<|im_end|>{% else %}<A>{% endif %}{% endif %}"
)
# Mistral 7B v0.3: ids of nine letters and digits, which stand in the prompt; users and answers without calls in turns.
NUMBERED_CALLS = (
    "{{ bos_token }}{% set turn = namespace(count=0) %}{% for m in messages %}"
    "{% if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}"
    "{% if (m.role == 'user') != (turn.count % 2 == 0) %}{{ raise_exception('whose turn') }}{% endif %}"
    "{% set turn.count = turn.count + 1 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}</U>"
    "{% elif m.tool_calls %}<CALLS>[{% for call in m.tool_calls %}"
    "{% if call.id is not defined or call.id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}"
    '{{ (call.function | tojson)[:-1] }}, "id": "{{ call.id }}"}{% endfor %}]{{ eos_token }}'
    "{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}{{ raise_exception('no id') }}{% endif %}"
    '<TOOL>{"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}</TOOL>'
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
# The template itself says what is generated.
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As people add marks to ChatML for training: the end of the turn stays outside.
CONTENT_MARKED = GENERATION.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
ALL = {
    "chatml": CHATML, "dated": DATED, "thinks": THINKS,
    "thinks_opened": THINKS_OPENED, "opens": OPENS, "closes": CLOSES, "channels": CHANNELS,
    "bare_calls": BARE_CALLS, "text_calls": TEXT_CALLS, "numbered_calls": NUMBERED_CALLS,
    "generation": GENERATION, "content_marked": CONTENT_MARKED,
}  # fmt: skip


SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def bytewise(template) -> PreTrainedTokenizerFast:
    """One token a byte, and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate([*SPECIAL, *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIAL[2:]
    )
    tokenizer.chat_template = template
    return tokenizer
