"""The most likely mistakes in what a command is given: models, data, settings. See mistakes.py."""

from mistake import GENERATE, SHORT, SMALL, TINY, Mistake, raising

MODELS = [
    Mistake(
        "a model's path that is none",
        "train --model_name_or_path models/tiny --output_dir run --data text.jsonl",
        "error: … is no local model folder and could not be fetched from the hub (…); where there is no "
        "network, give the folder of a model that was downloaded elsewhere",
        prepare=raising("huggingface_hub.snapshot_download", OSError("Got: ConnectError:\n Name not known")),
    ),
    Mistake(
        "a model's name without its owner",
        "evaluate --model Qwen3-0.6B",
        "error: no model folder at …: check the path, or give a hub name like owner/model",
    ),
    Mistake(
        "a bundled model that is none",
        "train --model_name_or_path bundled:teacher --data text.jsonl",
        "error: nothing is bundled as …; there are bundled:reasoner, bundled:student and bundled:questions/*.jsonl",
    ),
    Mistake(
        "a folder that holds no model",
        "generate --model folder --output new.jsonl",
        "error: … is a folder without config.json: expected a Hugging Face model folder",
    ),
    Mistake(
        "weights in another format",
        f"train {TINY} --model_name_or_path pickled",
        "error: … holds no safetensors weights, but …: convert them with save_pretrained of transformers first",
    ),
    Mistake(
        "weights that were copied in part",
        f"train {TINY} --model_name_or_path torn",
        "error: … cannot be loaded, for it is not whole or no safetensors file (…): copy or download it again",
    ),
    Mistake(
        "weights of which files are missing",
        f"train {TINY} --model_name_or_path sharded",
        "error: … lacks …, … of its … weight files: copy or download them again",
    ),
    Mistake(
        "a repository without its large files",
        "evaluate --model pointer --data questions.jsonl",
        "error: … is a pointer of Git LFS and no weights: fetch them with git lfs pull",
    ),
    Mistake(
        "an encoder and decoder",
        f"train {TINY} --model_name_or_path t5",
        "error: … holds an encoder and a decoder: expected a decoder-only language model that continues text, such as "
        "Qwen3 or Llama",
    ),
    Mistake(
        "an encoder",
        "evaluate --model bert --data questions.jsonl",
        "error: … holds a model of kind …, which does not write text: expected a decoder-only language model that "
        "continues text, such as Qwen3 or Llama",
    ),
    Mistake(
        "an architecture that transformers does not know",
        f"train {TINY} --model_name_or_path unknown",
        "error: the config of … cannot be read: The checkpoint you are trying to load has model type `…` but "
        "Transformers does not recognize this architecture. …",
    ),
    Mistake(
        "a model without its tokenizer",
        f"train {TINY} --model_name_or_path mute",
        "error: … holds no tokenizer: copy tokenizer.json and tokenizer_config.json of the model there",
    ),
    Mistake(
        "a base model without a chat template",
        f"train {TINY} --model_name_or_path base",
        "error: the tokenizer has no chat template: use an instruction-tuned model, or set one on it",
    ),
    Mistake(
        "a student and a teacher of two families",
        f"train {TINY} --teacher_model_name_or_path other",
        "error: teacher … and student … have different tokenizers, first at token …: …. Their distributions are over "
        "different tokens; choose models of one family, or let the teacher write traces (python -m trsd.generate) and "
        "learn their text with method sft and no teacher",
    ),
    Mistake(
        "a chat model that was never taught to think",
        f"{GENERATE} --model thoughtless",
        "note: the chat template does not mention <think>: it is added to every prompt. A model that was not taught to "
        "think may never close it: it needs traces that another model wrote",
        loads_weights=True,
    ),
    Mistake(
        "merging models of two sizes",
        "merge --models tiny,bundled:student --output merged",
        "error: … and … differ in their config: … is … and …",
    ),
    Mistake(
        "merging one model",
        "merge --models tiny --output merged",
        "error: models: expected two or more to average, or --adapter and --model, got …",
    ),
    Mistake(
        "an adapter that is none",
        "merge --adapter tiny --model tiny --output merged",
        "error: … holds no adapter_config.json: expected an adapter in peft's format",
    ),
    Mistake(
        "planning for a model that nobody knows",
        "plan --model Qwen3-5B",
        "error: …: did you mean …? no known shape (…), and no model: …",
    ),
    Mistake(
        "planning for a GPU that nobody knows",
        "plan --model Qwen3-4B --gpu H1000",
        "error: no figures for a device named '…': known are …; or measure it where it is",
    ),
]

DATA = [
    Mistake(
        "data that is not there",
        f"cache {TINY} --data tarin.jsonl",
        "error: no data file at …: check the path (it is taken relative to the current folder)",
    ),
    Mistake(
        "a folder as data",
        f"train {TINY} --data folder",
        "error: … is a folder: expected a .jsonl or .parquet file",
    ),
    Mistake(
        "a table of another program",
        "analyze --data table.csv --tokenizer tiny --output_dir analysis",
        "error: …: expected a .jsonl or .parquet file",
    ),
    Mistake(
        "an empty file",
        f"train {TINY} --data empty.jsonl",
        "error: … holds no usable row (it is empty)",
    ),
    Mistake(
        "conversations without thinking",
        f"train {TINY} --data chat.jsonl",
        "error: … holds no usable row (… x no thinking: neither a close tag nor a field such as reasoning_content)",
    ),
    Mistake(
        "a broken line",
        f"train {TINY} --data broken.jsonl",
        "error: …:…: not a JSON row in UTF-8 (…); mend or remove this line",
    ),
    Mistake(
        "one JSON document instead of lines",
        "evaluate --model tiny --data document.json",
        "error: …:…: not a JSON row in UTF-8 (…); is the file one JSON document? Write one object a line (JSON Lines)",
    ),
    Mistake(
        "columns of another name",
        f"train {TINY} --data columns.jsonl",
        "error: …:…: columns ['…'] fit no known form; expected messages, or prompt + reasoning + answer, or question + "
        "answer, or conversations, or input + output",
    ),
    Mistake(
        "questions and traces in one file",
        f"train {TINY} --data mixed.jsonl",
        "error: … mixes … rows with reasoning and … without: split them into two files, or generate traces for the "
        "latter first (python -m trsd.generate)",
    ),
    Mistake(
        "traces of another tokenizer",
        f"train {TINY} --data traces.jsonl --model_name_or_path other",
        "error: …:…: these ids were made by tokenizer …, the model's is …; generate the traces again with this model",
    ),
    Mistake(
        "evaluation questions without answers",
        f"train {TINY} --eval_data unanswered.jsonl",
        "error: evaluation needs questions with a reference answer; … of … have none, the first: '…'",
    ),
    Mistake(
        "evaluating on traces",
        "evaluate --model tiny --data traces.jsonl",
        "error: evaluation data holds traces: expected rows with question and answer",
    ),
    Mistake(
        "generating what is there already",
        f"{GENERATE} --data text.jsonl",
        "error: … already holds reasoning: nothing to generate",
    ),
    Mistake(
        "analysing questions",
        "analyze --data questions.jsonl --tokenizer tiny --output_dir analysis",
        "error: … holds questions without reasoning; generate traces first (python -m trsd.generate), or pass "
        "--solutions True when its answer column holds worked solutions that end in #### and the answer",
    ),
    Mistake(
        "a benchmark's name, misspelt",
        "evaluate --model tiny --data gsm8",
        "error: … is neither a file nor a benchmark; did you mean …? Expected a .jsonl or .parquet file, one of …, "
        "or a data set of the hub as OWNER/NAME, or OWNER/NAME:CONFIG:SPLIT with nothing for CONFIG where there is "
        "none",
    ),
    Mistake(
        "all traces are too long",
        f"train {TINY} --max_length 8",
        "error: …: no trace is left to learn from; dropped: … x longer than max_length=…",
    ),
    Mistake(
        "a model that never closes its thinking",
        GENERATE,
        "error: no trace is left; dropped: … x no close tag: the thinking never ends (within max_thinking_tokens; "
        "--close_unfinished True closes such traces)",
        loads_weights=True,
    ),
    Mistake(
        "evaluations of other questions",
        "compare one.json two.json",
        "error: … and … share 0 questions; … are in the first alone, … in the second: evaluate both on the same data",
    ),
    Mistake(
        "a comparison of files that are no evaluations",
        "compare tiny/config.json tiny/config.json",
        "error: … holds no question_ids, so its questions cannot be paired: evaluate again with this version of python "
        "-m trsd.evaluate and --output_dir",
    ),
    Mistake(
        "a comparison of a file that is not there",
        "compare one.json before.json",
        "error: …: no such file or folder: check the path",
    ),
]

SETTINGS = [
    Mistake(
        "a recipe that is not there",
        "train --config recipe.yml",
        "error: no recipe at … (No such file or directory); shipped: …",
    ),
    Mistake(
        "a recipe that is not YAML",
        "train --config questions.jsonl",
        "error: … is not YAML: …",
    ),
    Mistake(
        "minutes and seconds in a recipe",
        "train --config sixty.yaml",
        "error: …: YAML takes … for …: write the number itself",
    ),
    Mistake(
        "a key that is none",
        "cache --config unknown-key.yaml",
        "error: …: unknown key '…'; did you mean …?",
    ),
    Mistake(
        "another program's configuration as recipe",
        "train --config tiny/config.json",
        "error: …: unknown key '…'; python -m trsd.train --help names them all",
    ),
    Mistake(
        "a flag that is none",
        "train --batch_sise 4",
        "Unrecognized options: …",
    ),
    Mistake(
        "a space in a list",
        "evaluate --model tiny --budgets 0, 50%",
        "Unrecognized options: …",
    ),
    Mistake(
        "a number that is none",
        "train --max_steps 1.5",
        "Error parsing --…: expected a whole number, got '…'",
    ),
    Mistake(
        "a learning rate that is none",
        "train --learning_rate 1e-5x",
        "Error parsing --…: expected a number, got '…'",
    ),
    Mistake(
        "a method that is none",
        "train --method distill",
        "invalid choice '…' for argument '--…'. Expected one of (…).",
    ),
    Mistake(
        "a flag without its value",
        "train --learning_rate",
        "Missing value for argument '--…'. Expected 1 values.",
    ),
    Mistake(
        "a flag that must be there",
        "generate --model tiny",
        "Missing from python -m trsd.…: --… (required)",
    ),
    Mistake(
        "a setting of another method",
        f"train {TINY} --keep_fraction 0.5",
        "error: …: method … does not read it (methods that do: …): leave it out",
    ),
    Mistake(
        "a setting that another one leaves unread",
        f"train {TINY} --cut_fractions 0.5",
        "error: …: only … reads it: set that, or leave … out",
    ),
    Mistake(
        "lsp without a teacher",
        f"train {TINY} --method lsp",
        "error: teacher_model_name_or_path: lsp learns from a larger teacher: name one, or use method sft for text "
        "alone",
    ),
    Mistake(
        "settings of an adapter that there is not",
        f"train {TINY} --lora_alpha 32",
        "error: …: there is no adapter without lora_rank: set it, or leave … out",
    ),
    Mistake(
        "layers that the model has not",
        f"train {TINY} --lora_rank 8 --lora_target_modules query",
        "error: lora_target_modules: no linear layer of …'s body is called …: expected some of …",
    ),
    Mistake(
        "a row that is too short for a trace",
        f"train {TINY} --max_tokens_per_batch 4096",
        "error: max_tokens_per_batch: … cannot hold a trace of max_length …: raise the former or lower the latter",
    ),
    Mistake(
        "a budget above the limit",
        "evaluate --model tiny --data questions.jsonl --budgets 0,5000",
        "error: budgets: expected at most max_thinking_tokens …, got …: raise the former",
    ),
    Mistake(
        "a budget that is none",
        "evaluate --model tiny --data questions.jsonl --budgets half",
        "error: budgets: expected token counts or percents such as 64 or 50%, got …",
    ),
    Mistake(
        "a count that no budget is a percentage of",
        "evaluate --model tiny --data questions.jsonl --budgets 0,64 --percent_of 90",
        "error: percent_of: budgets in percent are of it, and there are none: leave it out",
    ),
    Mistake(
        "more thinking than the context holds",
        f"train {TINY} --eval_data questions.jsonl",
        "error: max_thinking_tokens: … tokens of thinking and … of answer leave no room for the questions of "
        "eval_data, the model's context holds …: lower max_thinking_tokens or max_answer_tokens",
    ),
    Mistake(
        "samples that are all alike",
        f"{GENERATE} --num_samples 4",
        "error: num_samples: expected 1, or more with a temperature above 0 (greedy samples are all alike), got … with "
        "temperature 0.0",
    ),
    Mistake(
        "a closer that does not close",
        "evaluate --model tiny --data questions.jsonl --closer 'Final answer:'",
        "error: closer … does not hold '</think>', so thinking would never end: add it, or use one of the presets …",
    ),
    Mistake(
        "more held out than there is",
        f"train {SMALL} --validation_samples 3",
        "error: validation_samples: … held out of … traces leave none to learn from: expected at most …; lower it, or "
        "give more data",
        leaves="traces",
    ),
    Mistake(
        "a sweep of a method that cuts otherwise",
        "sweep --method trsd --output_dir sweep",
        "error: a sweep needs method lsp or sft and a truncation with a fraction",
    ),
    Mistake(
        "a sweep without questions",
        "sweep --method sft --model_name_or_path tiny --data text.jsonl --output_dir sweep",
        "error: a sweep needs eval_data: questions with reference answers",
    ),
    Mistake(
        "a sweep of data that is not there",
        "sweep --method sft --model_name_or_path tiny --data no.jsonl --output_dir sweep --eval_data questions.jsonl "
        f"{SHORT} --eval_budgets 4",
        "error: no data file at …: check the path (it is taken relative to the current folder)",
    ),
    Mistake(
        "caching for a method without a teacher",
        f"cache {TINY} --method sft",
        "error: teacher: this recipe has alpha 0, so no teacher, and there is nothing to cache: train it as it is",
    ),
    Mistake(
        "an analysis without a tokenizer",
        "analyze --data traces.jsonl --output_dir analysis",
        "error: name the traces' tokenizer: --tokenizer (or --student for its own)",
    ),
]
