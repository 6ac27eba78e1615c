"""Tokens and characters: joining, targets and subjects, with a tokenizer of each kind, and chat templates."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from easyeditor.core.prompts import fact_row, span_inside
from easyeditor.errors import UsageError
from easyeditor.lm.text import Text, join, pad
from easyeditor.requests import EditRequest, subject_span
from families import build

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CORPUS = [
    "Watts Humphrey attended the Illinois Institute of Technology in Chicago.",
    "The capital of France is Paris and Forssa speaks Finnish.",
    'The author of "Dune" is Frank Herbert; the dunes are high.',
    "Ada and Adam; Canada; the president of the United States is here",
] * 4


def fast(backend: Tokenizer, **extra) -> transformers.PreTrainedTokenizerFast:
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **{**special, **extra})


def template(single: str, *tokens: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, special_tokens=[(t, SPECIAL.index(t)) for t in tokens])


def byte_level(post=None, trim: bool | None = None) -> transformers.PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if trim is not None:
        backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    if post is not None:
        backend.post_processor = post
    return fast(backend)


def metaspace(post=None, legacy: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Pieces with '▁' for a space, one also in front of the text; bytes for characters that it does not know."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, show_progress=False)
    )
    trained = json.loads(backend.to_str())["model"]
    vocab: dict[str, int] = trained["vocab"]
    for i in range(256):
        vocab[f"<0x{i:02X}>"] = len(vocab)
    merges = [tuple(pair) for pair in trained["merges"]]
    backend.model = models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>")
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if post is not None:
        backend.post_processor = post
    return fast(backend)


def wordpiece() -> transformers.PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, initial_alphabet=list(",:'"), special_tokens=special, show_progress=False
    )
    backend.train_from_iterator([*CORPUS, "日本の首都は東京"], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


class Slow(transformers.PreTrainedTokenizer):
    """A tokenizer in Python, which knows no offsets: a space belongs to the word behind it, other words fall apart."""

    KNOWN = ("Watts", " Humphrey", " attended", "The", " capital", " of", " France", " is", " Paris", " Canada", " the")

    def __init__(self, **kwargs) -> None:
        pieces = [*SPECIAL, *self.KNOWN, *map(chr, range(32, 127)), "\n", *"東京の首都は日本"]
        self.table = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        super().__init__(**{**special, **kwargs})

    @property
    def vocab_size(self) -> int:
        return len(self.table)

    def get_vocab(self) -> dict[str, int]:
        return {**self.table, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_) -> list[str]:
        words = re.findall(r" ?\w+|[^\w]", text)
        return [p for word in words for p in ([word] if word in self.table else list(word))]

    def _convert_token_to_id(self, token: str) -> int:
        return self.table.get(token, self.table["<unk>"])

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.table)[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


BOS = template("<s> $A", "<s>")
BOS_EOS = template("<s> $A </s>", "<s>", "</s>")
MAKERS = {
    "bytes": byte_level,
    "bytes, trimmed": lambda: byte_level(trim=True),
    "bytes, bos": lambda: byte_level(BOS),
    "bytes, bos, eos": lambda: byte_level(BOS_EOS),
    "pieces": metaspace,
    "pieces, bos": lambda: metaspace(BOS),
    "pieces, bos, legacy": lambda: metaspace(BOS, legacy=True),
    "pieces, eos": lambda: metaspace(template("$A </s>", "</s>")),
    "wordpiece": wordpiece,
    "python": Slow,
    "python, bos": lambda: Slow(special_tokens_pattern="bos"),
    "python, bos, eos": lambda: Slow(special_tokens_pattern="bos_eos"),
}
LEAD = {"wordpiece": ["[CLS]"]} | {name: ["<s>"] for name in MAKERS if ", bos" in name}
_made: dict[str, Text] = {}


def text_of(name: str) -> Text:
    if name not in _made:
        _made[name] = Text(MAKERS[name]())
    return _made[name]


def names(text: Text, ids) -> list[str]:
    return text.tokenizer.convert_ids_to_tokens(list(ids))


# --- joining -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "target", "joined"),
    [
        ("The capital of France is", "Paris", "The capital of France is Paris"),
        ("The capital of France is", " Paris", "The capital of France is Paris"),
        ("The capital of France is ", "Paris", "The capital of France is Paris"),
        ("Q: who?\nA:", "Bo", "Q: who?\nA: Bo"),
        ("Q: who?\n", "Bo", "Q: who?\nBo"),
        ("日本の首都は", "東京", "日本の首都は東京"),
        ("日本の首都は「", "東京", "日本の首都は「東京"),
        ("The capital of Japan is", "東京", "The capital of Japan is東京"),
        ("프랑스의 수도는", "파리", "프랑스의 수도는 파리"),
        ("Столица Франции", "Париж", "Столица Франции Париж"),
        ("", "Paris", "Paris"),
        ("x", "", "x "),
    ],
)
def test_join(prompt: str, target: str, joined: str) -> None:
    assert join(prompt, target) == joined


# --- what a text becomes -------------------------------------------------------------------------------------------

GOLDEN = {
    "bytes": ["Watts", "ĠHumphrey", "Ġattended"],
    "bytes, trimmed": ["Watts", "ĠHumphrey", "Ġattended"],
    "bytes, bos": ["<s>", "Watts", "ĠHumphrey", "Ġattended"],
    "bytes, bos, eos": ["<s>", "Watts", "ĠHumphrey", "Ġattended"],
    "pieces": ["▁Watts", "▁Humphrey", "▁attended"],
    "pieces, bos": ["<s>", "▁Watts", "▁Humphrey", "▁attended"],
    "pieces, bos, legacy": ["<s>", "▁Watts", "▁Humphrey", "▁attended"],
    "pieces, eos": ["▁Watts", "▁Humphrey", "▁attended"],
    "wordpiece": ["[CLS]", "watts", "humphrey", "attended"],
    "python": ["Watts", " Humphrey", " attended"],
    "python, bos": ["<s>", "Watts", " Humphrey", " attended"],
    "python, bos, eos": ["<s>", "Watts", " Humphrey", " attended"],
}


@pytest.mark.parametrize("name", MAKERS)
def test_golden_tokens(name: str) -> None:
    """One beginning if the tokenizer adds one; no end, though the tokenizer appends one: a prompt is not over."""
    text = text_of(name)
    encoded = text.encode("Watts Humphrey attended")
    assert names(text, encoded.ids) == GOLDEN[name]
    assert (encoded.spans is None) == name.startswith("python")
    assert text.subject_last(encoded, "Watts Humphrey") == len(LEAD.get(name, [])) + 1
    assert text.subject_last(encoded, "Watts") == len(LEAD.get(name, []))
    assert text.decode(encoded.ids).strip().lower() == "watts humphrey attended"


def test_a_slow_tokenizer_is_slow() -> None:
    assert not any(text_of(name).tokenizer.is_fast for name in MAKERS if name.startswith("python"))


def test_the_end_stays_where_a_decoder_of_its_own_reads() -> None:
    tok = MAKERS["pieces, eos"]()
    assert names(Text(tok, seq2seq=True), Text(tok, seq2seq=True).encode("Paris").ids)[-1] == "</s>"
    assert names(Text(tok), Text(tok).encode("Paris").ids)[-1] != "</s>"


# --- subjects ------------------------------------------------------------------------------------------------------

PLACES = {
    "first": ("Watts Humphrey attended", "Watts Humphrey"),
    "middle": ("The capital of France is", "France"),
    "last": ("The capital of France", "France"),
    "whole": ("France", "France"),
    "repeated": ("France, the capital of France is", "France"),
    "quoted": ('The author of "Dune" is', "Dune"),
    "single quotes": ("The author of 'Dune' is", "Dune"),
    "possessive": ("France's capital is", "France"),
    "comma": ("In France, the capital is", "France"),
    "inside another word": ("The Canada of Canadas is", "ana"),
    "whole word goes before inside": ("The capital of France and Franceville is", "France"),
    "cjk": ("日本の首都は", "日本"),
    "cjk at the end": ("首都は東京", "東京"),
    "cjk in a sentence": ("The capital of 東京 is", "東京"),
    "accents": ("The capital of Côte d'Ivoire is", "Côte d'Ivoire"),
    "unknown words": ("The capital of Xyzzyquux is", "Xyzzyquux"),
}
TOO_LITTLE = {"python": ("accents",), "wordpiece": ("accents", "unknown words")}  # have not all the characters


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MAKERS)
def test_subject(name: str, place: str) -> None:
    """The last token that holds a part of the subject: up to it all of the subject is read, before it not all of it."""
    text, (prompt, subject) = text_of(name), PLACES[place]
    encoded = text.encode(prompt)
    last = text.subject_last(encoded, subject)
    start, end = subject_span(prompt, subject)
    assert prompt[start:end] == subject
    if place in TOO_LITTLE.get(name.split(",")[0], ()):
        assert 0 <= last < len(encoded.ids)
        return

    def read(n: int) -> str:
        said = text.tokenizer.decode(list(encoded.ids[:n]), skip_special_tokens=True)
        return re.sub(r"\s|\ufffd|#", "", said).casefold()

    wanted = re.sub(r"\s", "", prompt[:end]).casefold()
    assert read(last + 1).startswith(wanted), "the token at `last` completes the subject"
    assert not read(last).startswith(wanted), "and no token before it does"
    if encoded.spans is not None:
        a, b = encoded.spans[last]
        assert a < end <= b and all(s[0] >= end for s in encoded.spans[last + 1 :])


def test_characters_of_several_tokens() -> None:
    text = text_of("bytes")
    encoded = text.encode("日本の首都は")
    assert len(encoded.ids) == 18, "three bytes for each character"
    assert text.last_in(encoded, 0, 2) == 5 and text.first_after(encoded, 2) == 6


@pytest.mark.parametrize(
    ("prompt", "subject", "start"),
    [
        ("France, of France is", "France", 11),
        ("Adam and Ada and Adam", "Ada", 9),
        ("Canada", "Ada".lower(), 3),
        ("C++ and C++", "C++", 8),
        ("a.b a.b", "a.b", 4),
        ("東京都東京", "東京", 3),
    ],
)
def test_subject_span(prompt: str, subject: str, start: int) -> None:
    assert subject_span(prompt, subject) == (start, start + len(subject))


def test_a_subject_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="'Spain' does not occur in the prompt"):
        subject_span("The capital of France is", "Spain")
    with pytest.raises(UsageError, match="No token of 'Paris' covers the characters 9 to 12"):
        text_of("bytes").last_in(text_of("bytes").encode("Paris"), 9, 12)


# --- targets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("target", ["Paris", " Paris", "Watts Humphrey", "a b"])
@pytest.mark.parametrize("prompt", ["The capital of France is", "The capital of France is ", 'He said "', "A:"])
def test_target(name: str, prompt: str, target: str) -> None:
    """The answer's tokens say the answer; what stands in front of them is the prompt and nothing of the answer."""
    text = text_of(name)
    if prompt[-1] == target[0] == " ":
        target = target[1:]
    encoded, first = text.encode_pair(prompt, target)
    assert encoded.text == join(prompt, target)
    assert 0 < first < len(encoded.ids)

    def squeeze(ids) -> str:
        return "".join(text.decode(ids).split()).casefold()

    assert squeeze(encoded.ids[first:]) == "".join(target.split()).casefold()
    assert squeeze(encoded.ids[:first]) == "".join(prompt.split()).casefold()
    assert first - len(text.encode(prompt.rstrip()).ids) in (0, 1), "a space of the prompt may be a token of its own"
    assert not {"</s>", "[SEP]"} & set(names(text, encoded.ids))


@pytest.mark.parametrize("name", ["bytes", "pieces, bos", "python"])
def test_cjk_target(name: str) -> None:
    text = text_of(name)
    encoded, first = text.encode_pair("日本の首都は", "東京")
    assert text.decode(encoded.ids[first:]) == "東京"


def test_golden_target() -> None:
    for name, expected in {"bytes, bos": ["ĠParis"], "pieces, bos": ["▁Paris"], "wordpiece": ["paris"]}.items():
        text = text_of(name)
        encoded, first = text.encode_pair("The capital of France is", "Paris")
        assert names(text, encoded.ids[first:]) == expected


# --- chat ----------------------------------------------------------------------------------------------------------

TURNS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }} [end]\n{% endfor %}[assistant]\n"


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("writes", [True, False])
def test_one_beginning(name: str, writes: bool) -> None:
    """Whether the template writes it, the tokenizer adds it, or both: one; and none if neither does."""
    text = Text(MAKERS[name]())
    mark = "[CLS]" if name == "wordpiece" else "<s>"
    text.tokenizer.chat_template = (mark if writes else "") + TURNS
    text.chat = True
    rendered = text.render("The capital of France is")
    assert rendered.count(mark) == int(writes)
    encoded = text.encode(rendered)
    found = names(text, encoded.ids)
    assert found.count(mark) == int(writes or name in LEAD)
    assert (found[0] == mark) == (writes or name in LEAD)
    assert not {"</s>", "[SEP]"} & set(found)
    said = text.tokenizer.decode(
        list(encoded.ids[: text.subject_last(encoded, "France") + 1]), skip_special_tokens=True
    )
    assert said.casefold().endswith("france")
    paired, first = text.encode_pair(rendered, "Paris")
    assert names(text, paired.ids).count(mark) == int(writes or name in LEAD)
    assert text.decode(paired.ids[first:]).strip().casefold() == "paris"


def test_two_tokens_in_front() -> None:
    """As with GLM: the tokenizer puts two tokens in front, and its template writes the same two."""
    post = processors.TemplateProcessing(single="<pad> <s> $A", special_tokens=[("<pad>", 0), ("<s>", 1)])
    text = Text(byte_level(post))
    assert names(text, text.encode("Watts").ids) == ["<pad>", "<s>", "Watts"]
    assert names(text, text.encode("<pad><s>Watts").ids) == ["<pad>", "<s>", "Watts"]


def test_no_template() -> None:
    text = Text(byte_level())
    assert text.render("x") == "x"
    text.chat = True
    with pytest.raises(UsageError, match="no chat template"):
        text.render("x")


@pytest.mark.parametrize("subject", ["assistant", "user", "end", "France"])
def test_subject_inside_the_rendered_prompt(subject: str) -> None:
    """Not in the words that the template writes around it, and not in the context in front."""
    prompt = f" the home of {subject} is "
    rendered = f"<s>[user] {subject}. {prompt.strip()} [end]\n[assistant]\n"
    start, end = span_inside(rendered, prompt, subject)
    assert rendered[start:end] == subject and rendered[:start].endswith("the home of ")
    lm = build("llama")
    lm.tokenizer.chat_template = TURNS
    lm.text.chat = True
    request = EditRequest(prompt="cat lives in", subject="cat", target_new="a dog cat")
    row = fact_row(lm, request, "The cat . {}", request.target_new)
    shown = names(lm.text, row.ids)
    assert shown.count("<s>") == 1 and shown[row.first :] == ["a", "dog", "cat"]
    assert shown[row.subject] == "cat" and shown[row.subject + 1] == "lives"


# --- padding -------------------------------------------------------------------------------------------------------


def test_pad() -> None:
    ids, mask = pad([[5, 6, 7], [8]], 9, "right")
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = pad([[5, 6, 7], [8]], 9, "left")
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert ids.dtype == mask.dtype == torch.long


def test_which_token_pads() -> None:
    assert text_of("bytes").pad_id == 0
    tok = byte_level()
    tok.pad_token = None
    assert Text(tok).pad_id == Text(tok).tokenizer.eos_token_id == 2
    assert text_of("wordpiece").eos_ids == set()
