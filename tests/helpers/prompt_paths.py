"""Random dialogues through everything that prompts a model: training, `generate`, servers, Ollama, llama.cpp."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from helpers.gguf_models import SMALL, make_pieces
from helpers.tiny_models import CHATML, SPECIAL, tokenizer
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora_exp.config.hydra_compose import compose
from qlora_exp.data import prompts, rows, tokenization
from qlora_exp.data.end_of_turn import end_of_turn
from qlora_exp.deploy import llama_cpp, ollama
from qlora_exp.deploy.chat import ChatModel, Sampling, read_requests
from qlora_exp.deploy.gguf import write as gguf
from qlora_exp.deploy.gguf.tokenizers import check_tokenizer
from qlora_exp.models import transformers_4
from qlora_exp.utils.errors import ConfigError, DataError

Dialogue = list[dict[str, Any]]

ASK = "{% if add_generation_prompt %}"
HEADER = (
    "{{ bos_token }}<|h|>system<|/h|>\n\nToday: 26 Jul 2024\n\n{% if messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] | trim }}{% set messages = messages[1:] %}{% endif %}<|im_end|>{% for m in messages %}"
    f"<|h|>{{{{ m['role'] }}}}<|/h|>\n\n{{{{ m['content'] | trim }}}}<|im_end|>{{% endfor %}}{ASK}"
    "<|h|>assistant<|/h|>\n\n{% endif %}"
)
LAST = (  # Mistral's: the system message is in the last turn
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set told = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2"
    " == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}[INST] "
    "{% if loop.last and told is defined %}{{ told + '\n\n' }}{% endif %}{{ m['content'] }}[/INST]{% else %} "
    "{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (  # Gemma's
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "{% for m in messages %}<|h|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    f"<|im_end|>\n{{% endfor %}}{ASK}<|h|>model\n{{% endif %}}"
)
THINKS = (  # Qwen3's: thoughts of earlier answers are left out
    "{% set ns = namespace(last=messages|length - 1) %}{% for m in messages[::-1] %}{% if m['role'] == 'user' %}"
    "{% set ns.last = messages|length - loop.index0 - 1 %}{% break %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.index0 < ns.last %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
    f"{{% endfor %}}{ASK}<|im_start|>assistant\n{{% endif %}}"
)
DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are \"helpful\".<|im_end|>\n{% endif %}" + CHATML
)
WITH_BOS = (*SPECIAL, "<|begin|>", "<|h|>", "<|/h|>")


def with_template(made: Any, template: str | None) -> Any:
    made.chat_template = template
    return made


def marked_once(template: str | None = None) -> Any:
    """Make a tokenizer like newer ones of Llama 2 and Mistral: a blank before a text, but not after special tokens."""
    made = make_pieces()
    made.backend_tokenizer.normalizer = None
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return with_template(made, template)


BEGINS = {"special": WITH_BOS, "bos_token": "<|begin|>", "single": "<|begin|> $A"}
CLOSES = {**BEGINS, "single": "<|begin|> $A <|im_end|>"}
TOLD = "dataset.system_message='Sei \"höflich\". 🙂'"
FORMATS: dict[str, tuple[str, Callable[[], Any]]] = {
    "ChatML": ("chat", tokenizer),
    "ChatML with a default system message": ("chat", lambda: tokenizer(template=DEFAULT)),
    "ChatML, dataset.system_message": (f"chat {TOLD}", tokenizer),
    "ChatML, tokenizer that adds BOS": ("chat", lambda: tokenizer(**BEGINS)),
    "ChatML, tokenizer that adds EOS": ("chat", lambda: tokenizer(single="$A <|im_end|>")),
    "ChatML that writes BOS": (
        "chat", lambda: tokenizer(**{**BEGINS, "single": None}, template="{{ bos_token }}" + CHATML)
    ),
    "ChatML that ends turns with text": (
        "chat", lambda: tokenizer(eos_token="<|endoftext|>", template=CHATML.replace("<|im_end|>", "### End"))
    ),
    "Llama 3's": ("chat", lambda: tokenizer(**BEGINS, template=HEADER)),
    "Llama 3's, dataset.system_message": (f"chat {TOLD}", lambda: tokenizer(**BEGINS, template=HEADER)),
    "Mistral's": ("chat", lambda: tokenizer(**BEGINS, template=LAST)),
    "Gemma's": ("chat", lambda: tokenizer(**BEGINS, template=NO_SYSTEM)),
    "Qwen3's": ("chat", lambda: tokenizer(template=THINKS)),
    **{
        f"{format_}, tokenizer that adds {what}": (format_, lambda named=named: tokenizer(**named, template=None))
        for format_ in ("alpaca", "prompt_completion", "text")
        for what, named in (("nothing", {}), ("BOS", BEGINS), ("BOS and EOS", CLOSES), ("a space", {"space": True}))
    },
    "prompt_completion, dataset.prompt_template": (
        "prompt_completion dataset.prompt_template='Question: {prompt}\\n\\nAnswer:'",
        lambda: tokenizer(**BEGINS, template=None),
    ),
    "alpaca, tokenizer of pieces": ("alpaca", make_pieces),
    "prompt_completion, tokenizer of pieces": ("prompt_completion", make_pieces),
    "alpaca, pieces with a mark at the beginning": ("alpaca", lambda: marked_once()),
    "prompt_completion, pieces with a mark at the beginning": ("prompt_completion", lambda: marked_once()),
    "ChatML, pieces with a mark at the beginning": ("chat", lambda: marked_once(CHATML)),
    "ChatML, tokenizer of pieces": ("chat", lambda: with_template(make_pieces(), CHATML)),
    "alpaca, tokenizer that begins with another token": (
        "alpaca", lambda: tokenizer(special=WITH_BOS, single="<|h|> <|begin|> $A", template=None)
    ),
}  # fmt: skip
"""Prompt formats: `dataset.format` with more keys, and a function that makes the tokenizer."""

_PIECES = st.sampled_from(
    [" ", "  ", "\n", "\t", "\r\n", "Hi", "Say river 5.", "é", "🙂", "\u2028", "\u00a0", "\ufeff", "<|im_end|>", "</s>",
     "<|im_start|>user\n", "<|begin|>", "{{ x }}", "{% if x %}", "<think>\nwell\n</think>\n\n", "12345", "\\n", '"""',
     "'", "### Response:\n", "[INST]", "don't", "\u0301", "x" * 40]
)  # fmt: skip
TEXTS = st.lists(_PIECES | st.text(max_size=3).filter(lambda text: text.isprintable()), min_size=1, max_size=5).map(
    "".join
)


@st.composite
def dialogues(draw: Any) -> Dialogue:
    """Draw a dialogue that ends with a question."""
    system = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    turns = draw(st.integers(0, 3))
    contents = draw(st.lists(TEXTS, min_size=2 * turns + 1, max_size=2 * turns + 1))
    said = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]
    if draw(st.booleans()) and draw(st.booleans()):  # content parts
        said[-1]["content"] = [{"type": "text", "text": text} for text in (contents[-1], draw(TEXTS))]
    return system + said


def plain(dialogue: Dialogue) -> Dialogue:
    """Join content parts, as clients of servers must for templates that render text."""
    joined = [m["content"] if isinstance(m["content"], str) else "".join(p["text"] for p in m["content"])
              for m in dialogue]  # fmt: skip
    return [{**message, "content": content} for message, content in zip(dialogue, joined, strict=True)]


@dataclass
class Paths:
    """Everything that prompts a model of one format. Each method gives token ids, or why the dialogue is refused."""

    name: str
    folder: Path

    def __post_init__(self) -> None:
        format_, make = FORMATS[self.name]
        words = [f"dataset.format={format_.split()[0]}", *format_.split(" ", 1)[1:]]
        self.is_chat = format_.startswith("chat")
        columns = ["dataset.messages_column=messages"] if self.is_chat else []
        base = make()
        base.save_pretrained(self.folder / "base")
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder / "base")
        own = [f"dataset.path={self.folder / 'rows.jsonl'}", "dataset.eval_size=1", "dataset.drop_leaks=none"]
        self.config = compose(
            ["method=lora", "model=tiny_llama", "dataset=own", "dataset.drop_duplicates=false", *own, *words, *columns]
        )
        dataset = self.config.dataset
        template = prompts.chat_template(dataset, self.tokenizer)
        self.saved = AutoTokenizer.from_pretrained(self.folder / "base")
        self.saved.chat_template = template
        self.saved.save_pretrained(self.folder / "saved")
        transformers_4.add_old_names(self.folder / "saved")
        self.saved = AutoTokenizer.from_pretrained(self.folder / "saved")
        embeddings = SimpleNamespace(weight=SimpleNamespace(shape=(10**6,)))
        config = SimpleNamespace(get_text_config=SimpleNamespace)
        model = SimpleNamespace(get_input_embeddings=lambda: embeddings, config=config)
        source = SimpleNamespace(config=self.config, source="run")
        self.chat = ChatModel(
            model, self.tokenizer, {"default": source}, {"default": template},
            {"default": end_of_turn(self.tokenizer, template)},
        )  # fmt: skip
        self.trims = "trim" in (template or "")
        self.modelfile = ollama.modelfile(self.saved, "model.gguf")

    def trained(self, asked: list[Dialogue]) -> Iterator[list[int] | str | None]:
        """Yield the prompts of training rows; None for a dialogue that is no row of the format."""
        file = self.folder / "rows.jsonl"
        kept = [place for place, dialogue in enumerate(asked) if self.is_chat or len(dialogue) == 1]
        more = [[{"role": "user", "content": text}] for text in "xy"]  # the others may all be empty
        lines = [json.dumps(self._row(dialogue)) for dialogue in [*(asked[place] for place in kept), *more]]
        file.write_text("\n".join(["", *lines]), "utf-8")
        encode = tokenization.encoder(self.config, self.tokenizer)
        found: dict[int, list[int] | str] = {}
        loaded = rows.load_rows(self.config.dataset)
        for part in (loaded.train, loaded.heldout):
            for row in part:
                place = int(re.findall(r"\d+", row["place"])[-1]) - 2
                try:
                    tokens = encode(row)
                    found[place] = tokens["input_ids"][: tokens["prompt_length"]]
                except DataError as error:
                    found[place] = str(error)
        places = {place: number for number, place in enumerate(kept)}
        for place in range(len(asked)):
            yield found.get(places[place]) if place in places else None

    def _row(self, dialogue: Dialogue) -> dict[str, Any]:
        answer = {"role": "assistant", "content": "Done."}
        if self.is_chat:
            return {"messages": [*dialogue, answer]}
        text = plain(dialogue)[0]["content"]
        return {"text": text} if self.config.dataset.format == "text" else {"prompt": text, "completion": "Done."}

    def generated(self, asked: list[Dialogue]) -> Iterator[list[int] | str]:
        """Yield the prompts of `generate` and `chat`."""
        file = self.folder / "asked.jsonl"
        file.write_text("".join(json.dumps({"messages": dialogue}) + "\n" for dialogue in asked), "utf-8")
        for request in read_requests(file):
            try:
                yield self.chat.encoded(request, Sampling(max_new_tokens=1))
            except DataError as error:
                yield str(error)

    def served(self, dialogue: Dialogue) -> list[int] | str:
        """Return the prompt of servers that use the saved tokenizer: transformers' and vLLM."""
        if not self.saved.chat_template:
            return "no chat template"
        try:
            ids: list[int] = self.saved.apply_chat_template(plain(dialogue), add_generation_prompt=True)["input_ids"]
        except TemplateError as error:
            return str(error)
        return ids

    def of_ollama(self, dialogue: Dialogue) -> list[int] | None:
        """Return the prompt of Ollama by the Modelfile's template; None if it has none, or cannot express this."""
        found = re.search(r'^TEMPLATE """(.*?)"""', self.modelfile, re.DOTALL | re.MULTILINE)
        dialogue = plain(dialogue)
        refused = self.saved.chat_template and isinstance(self.served(dialogue), str)  # Ollama drops system messages
        if not found or refused or not all(message["content"] for message in dialogue):
            return None  # without a template it renders the GGUF file's own; empty messages are none to it
        system = re.search(r'^SYSTEM """(.*?)"""', self.modelfile, re.DOTALL | re.MULTILINE)
        if system and dialogue[0]["role"] != "system":
            dialogue = [{"role": "system", "content": system[1]}, *dialogue]
        text = in_go(found[1], dialogue)
        begins = self.saved("a")["input_ids"][:1] == [self.saved.bos_token_id]
        if begins and self.saved.chat_template:  # as the GGUF file says
            begins = self.of_template(dialogue).startswith(self.saved.bos_token)
        text = f"{self.saved.bos_token if begins else ''}{text}"
        ids: list[int] = self.saved(text, add_special_tokens=False)["input_ids"]
        return ids

    def of_llama_cpp(self, server: Any, dialogue: Dialogue) -> list[int] | str:
        """Return the prompt of llama.cpp's server, which has this format's GGUF file."""
        messages = {"messages": plain(dialogue)}
        try:
            prompt = _post(server, "/apply-template", messages)["prompt"]
        except HTTPError as error:
            return error.read().decode()
        asked = {"content": prompt, "add_special": True, "parse_special": True}
        ids: list[int] = _post(server, "/tokenize", asked)["tokens"]
        answered = _post(server, "/v1/chat/completions", messages | {"max_tokens": 1, "temperature": 0})
        assert answered["usage"]["prompt_tokens"] == len(ids)
        return ids

    def llama_cpp(self) -> Any:
        """Start llama.cpp's server with a tiny model; None if GGUF files cannot have this tokenizer."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "saved")
        sizes = SMALL | {"vocab_size": len(tokenizer), "max_position_embeddings": 4096}
        config = AutoConfig.for_model("llama", **sizes)
        file = self.folder / "saved" / "model.gguf"
        try:
            check_tokenizer(tokenizer)
            gguf.write(AutoModelForCausalLM.from_config(config), tokenizer, file, "f32", "tiny")
        except ConfigError:
            return None
        return llama_cpp.load(file, 4096, 1)

    def differs_in_llama_cpp(self, dialogue: Dialogue) -> bool:
        """Return whether llama.cpp renders a dialogue differently: odd blanks to trim, or a plain text with BOS."""
        bos = self.saved.bos_token
        text = "".join(message["content"] for message in dialogue)  # which such a model continues
        twice = not self.saved.chat_template and bos and text.startswith(bos)
        return bool(twice or (self.trims and any(_has_odd_blanks(message) for message in dialogue)))

    def of_template(self, dialogue: Dialogue) -> str:
        """Return what the saved chat template renders."""
        return str(self.saved.apply_chat_template(plain(dialogue), add_generation_prompt=True, tokenize=False))


def _has_odd_blanks(message: dict[str, Any]) -> bool:
    """Return whether a text begins or ends with blanks that `trim` leaves in llama.cpp: others than ASCII's."""
    text = str(message["content"])
    return text.strip() != text.strip(" \t\n\r\v\f")


def _post(server: Any, path: str, body: dict[str, Any]) -> Any:
    request = Request(server.listening_address + path, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urlopen(request, timeout=60) as answer:
        return json.load(answer)


def in_go(template: str, dialogue: Dialogue) -> str:
    """Render as Ollama 0.33 does with a template that has no `.Messages` (template/template.go)."""
    collated: Dialogue = []
    for message in dialogue:
        if collated and collated[-1]["role"] == message["role"]:
            collated[-1] = {**message, "content": f"{collated[-1]['content']}\n\n{message['content']}"}
        else:
            collated.append(message)
    text, values = "", {"System": "", "Prompt": "", "Response": ""}

    def execute(cut: bool = False) -> str:
        shown = template.partition("{{ .Response }}")[0] if cut else template
        choice = re.compile(r"\{\{ if \.System \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}", re.DOTALL)
        shown = choice.sub(lambda match: match[1] if values["System"] else match[2], shown)
        assert "{{ if" not in shown
        shown = re.sub(r"\{\{ \.(\w+) \}\}", lambda match: values[match[1]], shown)
        values.update(dict.fromkeys(values, ""))
        return shown

    for message in collated:
        role, content = message["role"], message["content"]
        if (role == "system" and (values["Prompt"] or values["Response"])) or (role == "user" and values["Response"]):
            text += execute()
        values[{"system": "System", "user": "Prompt", "assistant": "Response"}[role]] = content
    return text + execute(cut=True)


def compare(paths: Paths, asked: list[Dialogue], counts: Counter[str], server: Any = None) -> None:
    """Check that all paths give one prompt for a dialogue, or refuse it; count what was compared."""
    trained = paths.trained(asked)
    for dialogue, learned, generated in zip(asked, trained, paths.generated(asked), strict=True):
        served, of_ollama = paths.served(dialogue), paths.of_ollama(dialogue)
        eos = paths.tokenizer.eos_token
        closed = any(m["role"] == "assistant" and m["content"].rstrip().endswith(eos) for m in dialogue)
        told = (paths.name, dialogue, learned, generated, served, of_ollama)
        if isinstance(generated, str):
            assert not isinstance(learned, list), told
            if "an empty prompt" in generated:  # servers generate from nothing
                continue
            assert isinstance(served, str), told
            if server is not None and dialogue[0]["role"] != "system":  # it moves such a message into the question
                assert isinstance(paths.of_llama_cpp(server, dialogue), str), told
            counts["refused"] += 1
            continue
        if isinstance(learned, list) and paths.config.dataset.format != "text":  # plain text has no prompt
            assert learned == generated, told
            counts["training"] += 1
        counts["dialogues"] += 1
        if closed:  # servers send EOS twice
            counts["EOS in an answer"] += 1
            continue
        if paths.saved.chat_template:
            assert served == generated, told
            counts["servers"] += 1
        if of_ollama is not None:
            assert of_ollama == generated, told
            counts["Ollama"] += 1
        if server is not None and not paths.differs_in_llama_cpp(plain(dialogue)):
            of_llama_cpp = paths.of_llama_cpp(server, dialogue)
            assert of_llama_cpp == generated, (*told, of_llama_cpp)
            counts["llama.cpp"] += 1
