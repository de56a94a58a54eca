"""Folders of transformers' get the ids, roles and size that its AutoTokenizer gives, or are refused with a reason.

Every folder is also saved, as run folders and checkpoints keep it, and must come back the same without asking again.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from megatron_7b.errors import DataFormatError
from megatron_7b.tokenizer import Tokenizer, load_tokenizer
from megatron_7b.tokenizer.agreement import why_ids_differ
from megatron_7b.tokenizer.probes import build_text_probes
from megatron_7b.tokenizer.settled import CLASS_OF_MODEL, OVERRULED_MODELS
from tests.support.assets import asset
from tests.tokenizer.foreign_folders import END, Json, vocabulary_files, write_folder

NEW = ("<|user|>", "<|im_end|>", " x", "union", "<own>", "The", "\n\n", "<s>", "</s>", "<unk>")
CHAT = "the people <|im_start|>user of war<|im_end|> law <|user|>12345  x"
TEXTS = [*build_text_probes([*NEW, END, "[SEP]"]), CHAT]
SIZES = {"gpt2": 400, "digits": 400, "qwen2": 401, "bert": 200, "spm_bpe": 320, "spm_unigram": 300, "gpt2_files": 400}
CLASSES = (
    None, "PreTrainedTokenizerFast", "TokenizersBackend", "GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer",
    "LlamaTokenizer", "LlamaTokenizerFast", "GPTNeoXTokenizer", "BertTokenizer",
)  # fmt: skip
MODELS = ("llama", "gpt2", "qwen2", "qwen3", "mistral", "olmo2", "granite", "phi3", "unheard_of")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def own_token(kind: str) -> str:
    """A special token that the vocabulary has already."""
    return "[SEP]" if kind == "bert" else "</s>" if kind.startswith("spm") else END


def encode_all(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        tokenizer.encode(text)


def assert_like_auto_tokenizer(ours: Tokenizer, folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), repr(text)
    assert (ours.eod_id, ours.bos_id, ours.pad_id) == (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1


def assert_saved_alike(ours: Tokenizer, folder: Path) -> None:
    """Saved, and saved again from there, it is the same for us, and the same for AutoTokenizer."""
    ours.save(folder / "once")
    once = load_tokenizer(folder / "once")
    once.save(folder / "twice")
    for again in (once, load_tokenizer(folder / "twice")):
        assert again.origin == "tokenizer.json"  # and nobody had to be asked
        assert again.identity == ours.identity
        assert (again.eod_id, again.bos_id, again.pad_id) == (ours.eod_id, ours.bos_id, ours.pad_id)
        assert again.vocab_size == ours.vocab_size
        assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert why_ids_differ(ours, folder / "once") is None


WAYS = (
    "added_tokens.json",
    "additional",
    "extra_list",
    "extra_dict",
    "decoder",
    "map",
    "map_additional",
    "eos",
    "eos_dict",
)
WITHOUT_FLAGS = ("added_tokens.json", "extra_dict", "eos")


@pytest.mark.parametrize("kind", ["gpt2", "bert", "spm_bpe", "spm_unigram"])
@pytest.mark.parametrize(
    ("way", "flag"),
    [(way, flag) for way in WAYS for flag in (None, *FLAGS[:4]) if flag is None or way not in WITHOUT_FLAGS],
)
def test_every_way_to_declare_a_token(tmp_path: Path, kind: str, way: str, flag: str | None) -> None:
    flags = {} if flag is None else {flag: True}
    size, name = SIZES[kind], "<|user|>"
    plain = dict.fromkeys(FLAGS, False) | {"content": name, "special": True} | flags
    typed = {"__type": "AddedToken", **plain}
    config: Json = {"tokenizer_class": "LlamaTokenizer" if kind.startswith("spm") else "PreTrainedTokenizerFast"}
    config |= {"eos_token": own_token(kind)}
    files: dict[str, Json | None] = {"tokenizer_config.json": config}
    match way:
        case "added_tokens.json":
            files["added_tokens.json"] = {name: size}
        case "additional":
            config["additional_special_tokens"] = [typed if flags else name]
        case "extra_list":
            config["extra_special_tokens"] = [typed if flags else name]
        case "extra_dict":
            config["extra_special_tokens"] = {"user_token": name}
        case "decoder":
            config["added_tokens_decoder"] = {str(size): plain}
        case "map":
            files["special_tokens_map.json"] = {"eos_token": plain}
        case "map_additional":
            files["special_tokens_map.json"] = {"additional_special_tokens": [typed if flags else name]}
        case "eos":
            config["eos_token"] = name
        case "eos_dict":
            config["eos_token"] = typed
    folder = write_folder(tmp_path / "folder", kind, files)
    ours = load_tokenizer(folder)
    assert_like_auto_tokenizer(ours, folder)
    if way != "map_additional" and kind != "bert" and not flags:  # else transformers may spell it out
        assert size in ours.encode(f"law {name} war")
    assert_saved_alike(ours, tmp_path)


def test_an_old_folder_of_a_chat_model(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "folder",
        "spm_bpe",
        {
            "added_tokens.json": {"<|im_start|>": 320, "<|im_end|>": 321},
            "tokenizer_config.json": {
                "tokenizer_class": "LlamaTokenizer",
                "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>",
            },
        },
    )  # fmt: skip
    ours = load_tokenizer(folder)
    assert_like_auto_tokenizer(ours, folder)
    assert {320, 321} <= set(ours.encode(CHAT))
    assert (ours.kind, ours.eod_id, ours.vocab_size) == ("hugging_face", 321, 322)
    assert_saved_alike(ours, tmp_path)
    assert (tmp_path / "twice" / "tokenizer_config.json").is_file()
    # The model file by its own name is SentencePiece's business alone, as Megatron-LM has it.
    assert load_tokenizer(folder / "tokenizer.model").eod_id == 2


@st.composite
def declarations(draw: st.DrawFn) -> tuple[str, dict[str, Json | None]]:
    """A vocabulary, and files beside it that agree with it, contradict it, or add to it."""
    kind = draw(st.sampled_from(sorted(SIZES)))
    at_once = json.loads(vocabulary_files(kind).get("tokenizer.json", b"{}")).get("added_tokens", [])
    names = st.sampled_from([own_token(kind)] * 4 + list(NEW) * draw(st.integers(0, 1)))
    flags = st.fixed_dictionaries(dict.fromkeys(FLAGS, st.booleans()))
    typed = st.builds(lambda name, some: {"__type": "AddedToken", "content": name, **some}, names, flags)
    token = names | typed
    config: Json = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "tokenizer_class": st.sampled_from(CLASSES[1:]),
                **dict.fromkeys(("eos_token", "bos_token", "unk_token", "pad_token"), token),
                "image_token": names,
                "additional_special_tokens": st.lists(token, max_size=2),
                "extra_special_tokens": st.lists(token, max_size=2) | st.builds(lambda name: {"a_token": name}, names),
                "split_special_tokens": st.booleans(),
                "add_prefix_space": st.booleans(),
                "legacy": st.booleans(),
                "do_lower_case": st.booleans(),
                "add_bos_token": st.booleans(),
                "model_max_length": st.just(10),
            },
        )
    )
    match draw(st.sampled_from(["none", "none", "same", "new"])):
        case "same":
            config["added_tokens_decoder"] = {
                str(known["id"]): {key: value for key, value in known.items() if key != "id"} for known in at_once
            }
        case "new":
            first = SIZES[kind] + draw(st.sampled_from([0, 1, 100]))
            added = draw(st.lists(st.sampled_from(NEW), min_size=1, max_size=3, unique=True))
            config["added_tokens_decoder"] = {
                str(first + index): {"content": name, **draw(flags)} for index, name in enumerate(added)
            }
    maybe = functools.partial(st.one_of, st.none(), st.none())
    return kind, {
        "tokenizer_config.json": config if draw(st.integers(0, 9)) else None,
        "special_tokens_map.json": draw(maybe(st.dictionaries(st.sampled_from(["eos_token", "pad_token"]), token))),
        "added_tokens.json": draw(maybe(st.dictionaries(names, st.integers(SIZES[kind], SIZES[kind] + 9), max_size=2))),
        "config.json": draw(maybe(st.builds(lambda name: {"model_type": name}, st.sampled_from(MODELS)))),
    }


@settings(max_examples=150)
@given(declarations())
def test_whatever_is_declared(
    tmp_path_factory: pytest.TempPathFactory, declared: tuple[str, dict[str, Json | None]]
) -> None:
    kind, files = declared
    tmp_path = tmp_path_factory.mktemp("declared")
    folder = write_folder(tmp_path / "folder", kind, files)
    says_something = any(files.values())
    try:
        ours = load_tokenizer(folder)
    except DataFormatError:
        with pytest.raises(Exception):  # noqa: B017, PT011  # it fails there too, to load or to encode
            encode_all(folder)
        return
    if not says_something:  # then it is not transformers' folder: SentencePiece's own ids, and the usual eod
        return
    assert_saved_alike(ours, tmp_path)
    assert_like_auto_tokenizer(ours, folder)


@pytest.mark.parametrize("kind", ["gpt2", "digits", "qwen2"])
@pytest.mark.parametrize("name", [name for name in CLASSES if name != "BertTokenizer"])
@pytest.mark.parametrize("model_type", [None, "llama", "gpt2", "qwen2", "qwen3", "mistral"])
def test_classes_that_split_text_by_rules_of_their_own(
    tmp_path: Path, kind: str, name: str | None, model_type: str | None
) -> None:
    config = {"eos_token": END, "unk_token": END, "pad_token": END, "bos_token": END}
    folder = write_folder(
        tmp_path / "folder",
        kind,
        {
            "tokenizer_config.json": config if name is None else config | {"tokenizer_class": name},
            "config.json": None if model_type is None else {"model_type": model_type},
        },
    )
    ours = load_tokenizer(folder)
    assert_like_auto_tokenizer(ours, folder)
    assert_saved_alike(ours, tmp_path)


@pytest.mark.parametrize(("kind", "name"), [("gpt2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer")])
@pytest.mark.parametrize("case", ["not_in_decoder", "flags", "no_default", "in_another_order"])
def test_added_tokens_of_classes_that_rebuild(tmp_path: Path, kind: str, name: str, case: str) -> None:
    config: Json = {"tokenizer_class": name, "eos_token": END, "unk_token": END, "pad_token": END, "bos_token": END}
    folder = write_folder(tmp_path / "folder", kind, {})
    definition = json.loads((folder / "tokenizer.json").read_text())
    (known,) = definition["added_tokens"]
    size = len(definition["model"]["vocab"]) + (END not in definition["model"]["vocab"])
    new = {**known, "id": size, "content": "<|user|>"}
    if case == "not_in_decoder":  # which is then taken for all that there are
        config["added_tokens_decoder"] = {str(known["id"]): {key: known[key] for key in known if key != "id"}}
    elif case == "flags":
        new |= {"lstrip": True, "rstrip": True}
        config["eos_token"] = "<|user|>"
    elif case == "no_default":
        config = {"tokenizer_class": name, "eos_token": "<|user|>"}
        definition["added_tokens"] = []
    else:
        definition["added_tokens"].append({**new, "id": size + 1, "content": "<|im_end|>"})
        config["additional_special_tokens"] = ["<|im_end|>", "<|user|>"]
    if case != "no_default":
        definition["added_tokens"].insert(1, new)
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(folder)
    assert_like_auto_tokenizer(ours, folder)
    assert_saved_alike(ours, tmp_path)


def test_what_is_known_of_transformers_is_so_in_the_installed_one() -> None:
    assert {name: TOKENIZER_MAPPING_NAMES.get(name) for name in CLASS_OF_MODEL} == CLASS_OF_MODEL
    overruled = set(CLASS_OF_MODEL) & MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    assert overruled == set(OVERRULED_MODELS)


def test_usual_folders_are_read_without_transformers(tmp_path: Path) -> None:
    config = {"eos_token": END, "unk_token": END, "bos_token": END, "pad_token": END, "add_prefix_space": False}
    classes = {"qwen2": "Qwen2Tokenizer", "gpt2": "GPT2Tokenizer", "digits": "PreTrainedTokenizerFast"}
    written = [
        write_folder(tmp_path / kind, kind, {"tokenizer_config.json": config | {"tokenizer_class": name}})
        for kind, name in classes.items()
    ]
    folders = list(map(str, [*written, asset("gpt2"), asset("smollm2-135m")]))
    program = (
        "import sys; from megatron_7b.tokenizer import load_tokenizer\n"
        "print({load_tokenizer(path).origin for path in sys.argv[1:]}, {'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program, *folders], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "{'tokenizer.json'} set()"


def test_transformers_is_asked_in_a_process_of_its_own(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "gpt2", {"tokenizer_config.json": {"eos_token": "<|user|>"}})
    program = (
        "import sys; from megatron_7b.tokenizer import load_tokenizer\n"
        "print(load_tokenizer(sys.argv[1]).eod_id, {'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "400 set()"


def test_a_folder_that_transformers_cannot_load(tmp_path: Path) -> None:
    config = {"tokenizer_class": "NewTokenizer", "auto_map": {"AutoTokenizer": ["new.NewTokenizer", None]}}
    folder = write_folder(tmp_path, "spm_bpe", {"tokenizer_config.json": config})
    with pytest.raises(DataFormatError, match=r"(?s)transformers cannot load.*hint: name the file .*tokenizer\.model"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["gpt2", "smollm2-135m", "minilm"])
def test_real_folders(tmp_path: Path, name: str) -> None:
    ours = load_tokenizer(asset(name))
    assert_like_auto_tokenizer(ours, asset(name))
    assert_saved_alike(ours, tmp_path)


def test_truncation_padding_and_what_is_added_at_the_ends_change_no_ids(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "bert", {"tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}})
    file = folder / "tokenizer.json"
    backend = Backend.from_file(str(file))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(file))
    definition = json.loads(file.read_text())
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]}},
    }
    file.write_text(json.dumps(definition))
    ours = load_tokenizer(folder)
    assert_like_auto_tokenizer(ours, folder)
    assert len(ours.encode(CHAT)) > 8
    assert_saved_alike(ours, tmp_path)


def test_tokenizer_json_beside_another_model_goes_first(tmp_path: Path) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    folder = write_folder(tmp_path / "folder", "gpt2", {"tokenizer_config.json": config})
    (folder / "tokenizer.model").write_bytes(vocabulary_files("spm_bpe")["tokenizer.model"])
    assert_like_auto_tokenizer(load_tokenizer(folder), folder)


@pytest.mark.parametrize("asked", [False, True])
def test_chat_templates_are_kept(tmp_path: Path, asked: bool) -> None:
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|user|>" if asked else END}
    config |= {"chat_template": "{{ messages }}", "model_max_length": 77}
    folder = write_folder(tmp_path / "folder", "gpt2", {"tokenizer_config.json": config})
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    load_tokenizer(folder).save(tmp_path / "saved")
    saved, theirs = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("saved", "folder"))
    assert saved.chat_template == theirs.chat_template
    assert saved.model_max_length == 77


@pytest.mark.parametrize("eos", [END, "<far>"])
@pytest.mark.parametrize(
    ("content", "index"), [("<far>", 500), ("<far>", 400), ("the", 400), (END, 500), ("<far>", 0), ("<far>", 3)]
)
def test_ids_that_the_library_does_not_follow(tmp_path: Path, content: str, index: int, eos: str) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    folder = write_folder(tmp_path / "folder", "gpt2", {"tokenizer_config.json": config})
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["added_tokens"].append({**definition["added_tokens"][0], "id": index, "content": content})
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    ours = load_tokenizer(folder)
    assert_like_auto_tokenizer(ours, folder)
    assert_saved_alike(ours, tmp_path)


def test_why_ids_differ(tmp_path: Path) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    ours = load_tokenizer(write_folder(tmp_path / "ours", "digits", {"tokenizer_config.json": config}))
    export = write_folder(
        tmp_path / "export", "digits", {"tokenizer_config.json": config, "config.json": {"model_type": "qwen2"}}
    )
    assert why_ids_differ(ours, tmp_path / "ours") is None
    difference = why_ids_differ(ours, export)
    assert difference is not None
    assert "Qwen2Tokenizer gives" in difference
    other_end = write_folder(tmp_path / "end", "digits", {"tokenizer_config.json": config | {"eos_token": "!"}})
    assert "ends a text with 1, this tokenizer a document with 0" in str(why_ids_differ(ours, other_end))
