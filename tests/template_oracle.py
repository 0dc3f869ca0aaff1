"""What every chat template of Unsloth must write, set down by hand from what the model families document.

Nothing here is computed from a template. Three conversations are written out for each of the 26 distinct templates, under the names that jobs use. The first draft was written before
any rendering was looked at; where Unsloth then proved to write something else than the family documents, the text is Unsloth's and `peculiar` says what differs.

bos        text that begins a conversation, '' where the template writes none
end        text that ends a trained answer
answers    what is trained of `two_turns`, in order: from behind the generation prompt (behind the role's header where the text lacks the prompt) to the end token
two_turns  user "What is 2+2?", assistant "4.", user "And 3+3?", assistant "6."
system     system "Be brief.", user "What is 2+2?", assistant "4."
prompt     user "What is 2+2?" and the generation prompt
dynamic    how a text depends on the day
"""

import datetime

TWO_TURNS = [
    dict(role='user', content='What is 2+2?'),
    dict(role='assistant', content='4.'),
    dict(role='user', content='And 3+3?'),
    dict(role='assistant', content='6.'),
]
SYSTEM = [dict(role='system', content='Be brief.'), *TWO_TURNS[:2]]
CONVERSATIONS = dict(
    two_turns=TWO_TURNS, system=SYSTEM, prompt=TWO_TURNS[:1]
)  # `prompt` is rendered with the generation prompt

_CHATML = dict(
    bos='',
    end='<|im_end|>',
    answers=['4.<|im_end|>', '6.<|im_end|>'],
    two_turns='<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n4.<|im_end|>\n<|im_start|>user\nAnd 3+3?<|im_end|>\n<|im_start|>assistant\n6.<|im_end|>\n',
    system='<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n4.<|im_end|>\n',
    prompt='<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n',
)

_GEMMA = dict(
    bos='<bos>',
    end='<end_of_turn>',
    answers=['4.<end_of_turn>', '6.<end_of_turn>'],
    two_turns='<bos><start_of_turn>user\nWhat is 2+2?<end_of_turn>\n<start_of_turn>model\n4.<end_of_turn>\n'
    '<start_of_turn>user\nAnd 3+3?<end_of_turn>\n<start_of_turn>model\n6.<end_of_turn>\n',
    system='<bos><start_of_turn>user\nBe brief.\n\nWhat is 2+2?<end_of_turn>\n<start_of_turn>model\n4.<end_of_turn>\n',
    prompt='<bos><start_of_turn>user\nWhat is 2+2?<end_of_turn>\n<start_of_turn>model\n',
)

_GEMMA4 = dict(
    bos='',
    end='<turn|>',
    answers=['4.<turn|>', '6.<turn|>'],
    two_turns='<|turn>user\nWhat is 2+2?<turn|>\n<|turn>model\n4.<turn|>\n<|turn>user\nAnd 3+3?<turn|>\n<|turn>model\n6.<turn|>\n',
    system='<|turn>system\nBe brief.<turn|>\n<|turn>user\nWhat is 2+2?<turn|>\n<|turn>model\n4.<turn|>\n',
    prompt='<|turn>user\nWhat is 2+2?<turn|>\n<|turn>model\n',
    peculiar='No <bos> in the text, though Gemma was trained with one; get_chat_template puts it there only for tokenizer classes called Gemma….',
)

_THINKS = dict(
    bos='',
    end='<|im_end|>',
    two_turns='<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n4.<|im_end|>\n'
    '<|im_start|>user\nAnd 3+3?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n6.<|im_end|>\n',
    system='<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n4.<|im_end|>\n',
)

ORACLE = {
    'unsloth': dict(
        bos='<s>',
        end='</s>',
        answers=['4.</s>', '6.</s>'],
        two_turns='<s>You are a helpful assistant to the user\n>>> User: What is 2+2?\n>>> Assistant: 4.</s>\n>>> User: And 3+3?\n>>> Assistant: 6.</s>\n',
        system='<s>Be brief.\n>>> User: What is 2+2?\n>>> Assistant: 4.</s>\n',
        prompt='<s>You are a helpful assistant to the user\n>>> User: What is 2+2?\n>>> Assistant: ',
    ),
    'zephyr': dict(
        bos='',
        end='</s>',
        answers=['4.</s>', '6.</s>'],
        two_turns='<|user|>\nWhat is 2+2?</s>\n<|assistant|>\n4.</s>\n<|user|>\nAnd 3+3?</s>\n<|assistant|>\n6.</s>\n',
        system='<|system|>\nBe brief.</s>\n<|user|>\nWhat is 2+2?</s>\n<|assistant|>\n4.</s>\n',
        prompt='<|user|>\nWhat is 2+2?</s>\n<|assistant|>\n',
    ),
    'chatml': _CHATML,
    'mistral': dict(
        bos='<s>',
        end='</s>',
        answers=['4.</s>', '6.</s>'],
        two_turns='<s>[INST] What is 2+2? [/INST]4.</s>[INST] And 3+3? [/INST]6.</s>',
        system='<s>[INST] Be brief. What is 2+2? [/INST]4.</s>',
        prompt='<s>[INST] What is 2+2? [/INST]',
        peculiar="Mistral's own encoder puts a space before each answer and a blank line behind the system text; Unsloth writes no space and one space.",
    ),
    'llama': dict(
        bos='<s>',
        end=' </s>',
        answers=[' 4. </s>', ' 6. </s>'],  # Meta begins each exchange anew: one <s> per user turn
        two_turns='<s>[INST] What is 2+2? [/INST] 4. </s><s>[INST] And 3+3? [/INST] 6. </s>',
        system='<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is 2+2? [/INST] 4. </s>',
        prompt='<s>[INST] What is 2+2? [/INST]',
    ),
    'vicuna': dict(
        bos='<s>',
        end='</s>',
        answers=[' 4.</s>', ' 6.</s>'],
        two_turns="<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions. "
        'USER: What is 2+2? ASSISTANT: 4.</s>USER: And 3+3? ASSISTANT: 6.</s>',
        system='<s>Be brief. USER: What is 2+2? ASSISTANT: 4.</s>',
        prompt="<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions. "
        'USER: What is 2+2? ASSISTANT:',
    ),
    'vicuna_old': dict(
        bos='<s>',
        end='</s>',
        answers=[' 4.</s>', ' 6.</s>'],
        two_turns="<s>A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the human's questions.\n"
        '### Human: What is 2+2?\n### Assistant: 4.</s>\n### Human: And 3+3?\n### Assistant: 6.</s>\n',
        system='<s>Be brief.\n### Human: What is 2+2?\n### Assistant: 4.</s>\n',
        prompt="<s>A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the human's questions.\n"
        '### Human: What is 2+2?\n### Assistant:',
    ),
    'alpaca-turns': dict(
        bos='<s>',
        end='</s>',
        answers=['4.</s>', '6.</s>'],
        two_turns='<s>Below are some instructions that describe some tasks. Write responses that appropriately complete each request.\n\n'
        '### Instruction:\nWhat is 2+2?\n\n### Response:\n4.</s>\n\n### Instruction:\nAnd 3+3?\n\n### Response:\n6.</s>\n\n',
        system='<s>Be brief.\n\n### Instruction:\nWhat is 2+2?\n\n### Response:\n4.</s>\n\n',
        prompt='<s>Below are some instructions that describe some tasks. Write responses that appropriately complete each request.\n\n'
        '### Instruction:\nWhat is 2+2?\n\n### Response:\n',
        peculiar="Stanford's preamble speaks of one instruction and has one exchange; Unsloth's speaks of several, for many turns.",
    ),
    'gemma': _GEMMA
    | dict(
        system='<bos><start_of_turn>user\nBe brief. What is 2+2?<end_of_turn>\n<start_of_turn>model\n4.<end_of_turn>\n',
        peculiar='Google has no system turn for Gemma 1 and 2; Unsloth puts the text before the first question with one space, where Gemma 3 has a blank line.',
    ),
    'gemma_chatml': dict(
        bos='<bos>',
        end='<|im_end|>',
        answers=['4.<|im_end|>', '6.<|im_end|>'],
        two_turns='<bos><|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n4.<|im_end|>\n<|im_start|>user\nAnd 3+3?<|im_end|>\n<|im_start|>assistant\n6.<|im_end|>\n',
        system='<bos><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n4.<|im_end|>\n',
        prompt='<bos><|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n',
    ),
    'llama-3': dict(
        bos='<|begin_of_text|>',
        end='<|eot_id|>',
        answers=['4.<|eot_id|>', '6.<|eot_id|>'],
        two_turns='<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is 2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n4.<|eot_id|>'
        '<|start_header_id|>user<|end_header_id|>\n\nAnd 3+3?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n6.<|eot_id|>',
        system='<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>'
        '<|start_header_id|>user<|end_header_id|>\n\nWhat is 2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n4.<|eot_id|>',
        prompt='<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is 2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n',
    ),
    'phi-3': dict(
        bos='',
        end='<|end|>',
        answers=['4.<|end|>', '6.<|end|>'],
        two_turns='<|user|>\nWhat is 2+2?<|end|>\n<|assistant|>\n4.<|end|>\n<|user|>\nAnd 3+3?<|end|>\n<|assistant|>\n6.<|end|>\n',
        system='<|system|>\nBe brief.<|end|>\n<|user|>\nWhat is 2+2?<|end|>\n<|assistant|>\n4.<|end|>\n',
        prompt='<|user|>\nWhat is 2+2?<|end|>\n<|assistant|>\n',
        peculiar="Microsoft's template closes a conversation with the end-of-sequence token; Unsloth's does not.",
    ),
    'llama-3.1': dict(
        bos='<|begin_of_text|>',
        end='<|eot_id|>',
        answers=['4.<|eot_id|>', '6.<|eot_id|>'],
        two_turns='<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 July 2024\n\n<|eot_id|>'
        '<|start_header_id|>user<|end_header_id|>\n\nWhat is 2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n4.<|eot_id|>'
        '<|start_header_id|>user<|end_header_id|>\n\nAnd 3+3?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n6.<|eot_id|>',
        system='<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 July 2024\n\nBe brief.<|eot_id|>'
        '<|start_header_id|>user<|end_header_id|>\n\nWhat is 2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n4.<|eot_id|>',
        prompt='<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 July 2024\n\n<|eot_id|>'
        '<|start_header_id|>user<|end_header_id|>\n\nWhat is 2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n',
        peculiar="Meta writes the date as '26 Jul 2024', Unsloth as '26 July 2024'.",
        dynamic='A fixed day unless `date_string` is given to the template; it never follows the calendar.',
    ),
    'qwen-2.5': dict(
        bos='',
        end='<|im_end|>',
        answers=['4.<|im_end|>', '6.<|im_end|>'],
        two_turns='<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n'
        '<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n4.<|im_end|>\n<|im_start|>user\nAnd 3+3?<|im_end|>\n<|im_start|>assistant\n6.<|im_end|>\n',
        system='<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n4.<|im_end|>\n',
        prompt='<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n',
    ),
    'phi-4': dict(
        bos='',
        end='<|im_end|>',
        answers=['4.<|im_end|>', '6.<|im_end|>'],
        two_turns='<|im_start|>user<|im_sep|>What is 2+2?<|im_end|><|im_start|>assistant<|im_sep|>4.<|im_end|>'
        '<|im_start|>user<|im_sep|>And 3+3?<|im_end|><|im_start|>assistant<|im_sep|>6.<|im_end|>',
        system='<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>What is 2+2?<|im_end|><|im_start|>assistant<|im_sep|>4.<|im_end|>',
        prompt='<|im_start|>user<|im_sep|>What is 2+2?<|im_end|><|im_start|>assistant<|im_sep|>',
    ),
    'gemma-3': _GEMMA,
    'qwen-3': _THINKS
    | dict(
        answers=[
            '4.<|im_end|>',
            '<think>\n\n</think>\n\n6.<|im_end|>',
        ],  # Only answers behind the last question have a place for thoughts
        prompt='<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n',
    ),
    'gemma-3n': _GEMMA,
    'gemma-4': _GEMMA4,
    'gemma-4-thinking': _GEMMA4
    | dict(
        prompt='<|turn>user\nWhat is 2+2?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>',
        peculiar='No <bos>, as in gemma-4; and the generation prompt holds an empty thought channel that the training text lacks, so it is no prefix of it.',
    ),
    'gpt-oss': dict(
        bos='',
        end='<|return|>',
        end_earlier='<|end|>',
        answers=['<|channel|>final<|message|>4.<|end|>', '<|channel|>final<|message|>6.<|return|>'],
        two_turns='<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\nCurrent date: {date}\n\nReasoning: medium\n\n'
        '# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>'
        '<|start|>user<|message|>What is 2+2?<|end|><|start|>assistant<|channel|>final<|message|>4.<|end|>'
        '<|start|>user<|message|>And 3+3?<|end|><|start|>assistant<|channel|>final<|message|>6.<|return|>',
        system='<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\nCurrent date: {date}\n\nReasoning: medium\n\n'
        '# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>'
        '<|start|>developer<|message|># Instructions\n\nBe brief.<|end|><|start|>user<|message|>What is 2+2?<|end|><|start|>assistant<|channel|>final<|message|>4.<|return|>',
        prompt='<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\nCurrent date: {date}\n\nReasoning: medium\n\n'
        '# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|><|start|>user<|message|>What is 2+2?<|end|><|start|>assistant',
        dynamic='Today, as 2025-06-28, stands for `{date}`; `expected` fills it in.',
    ),
    'qwen3-instruct': _CHATML,
    'qwen3-thinking': _THINKS
    | dict(
        answers=['4.<|im_end|>', '\n</think>\n\n6.<|im_end|>'],
        prompt='<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n',
    ),
    'lfm-2': dict(
        bos='<|startoftext|>',
        end='<|im_end|>',
        answers=['4.<|im_end|>', '6.<|im_end|>'],
        two_turns='<|startoftext|><|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n4.<|im_end|>\n'
        '<|im_start|>user\nAnd 3+3?<|im_end|>\n<|im_start|>assistant\n6.<|im_end|>\n',
        system='<|startoftext|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n4.<|im_end|>\n',
        prompt='<|startoftext|><|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n',
    ),
    'starling': dict(
        bos='<s>',
        end='<|end_of_turn|>',
        answers=[' 4.<|end_of_turn|>', ' 6.<|end_of_turn|>'],
        two_turns='<s>GPT4 Correct User: What is 2+2?<|end_of_turn|>GPT4 Correct Assistant: 4.<|end_of_turn|>'
        'GPT4 Correct User: And 3+3?<|end_of_turn|>GPT4 Correct Assistant: 6.<|end_of_turn|>',
        system='<s>GPT4 Correct System: Be brief.<|end_of_turn|>GPT4 Correct User: What is 2+2?<|end_of_turn|>GPT4 Correct Assistant: 4.<|end_of_turn|>',
        prompt='<s>GPT4 Correct User: What is 2+2?<|end_of_turn|>GPT4 Correct Assistant:',
    ),
    'yi-chat': _CHATML
    | dict(peculiar="Unsloth's stop word is <|endoftext|>, which the text never holds; answers end in <|im_end|>."),
}


def expected(name, part):
    "The text that `part` of `name` must be today"
    return ORACLE[name][part].replace('{date}', f'{datetime.date.today():%Y-%m-%d}')
