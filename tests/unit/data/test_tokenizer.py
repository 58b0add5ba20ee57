import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarlx.data.tokenizer import (
    ByteTokenizer,
    Tokenizer,
    TokenizerError,
    WordTokenizer,
    load_tokenizer,
    tokenizer_from_json,
)


def tokenizer_json(folder: Path, specials: tuple[str, ...] = ("<|endoftext|>",)) -> Path:
    """A byte-level BPE trained on a few words, as the tokenizers library writes it."""
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers, trainers

    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(specials),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    engine.train_from_iterator(["the cat sat on the mat", "the dog sat"] * 5, trainer)
    engine.enable_truncation(4)  # must not survive: it would cut documents silently
    folder.mkdir(parents=True, exist_ok=True)
    engine.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(params=["bytes", "file"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "bytes":
        return load_tokenizer("bytes")
    return load_tokenizer(tokenizer_json(tmp_path / "bpe"))


@pytest.mark.parametrize(
    "text", ["", "the cat", "Ünïcode — 漢字 🎈", "a\0b\r\n\tc", "the cat sat on the mat " * 9]
)
def test_decoding_gives_back_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, text]) == [tokenizer.encode(text)] * 2


@given(st.text())
def test_bytes_give_back_any_text(text: str) -> None:
    for specials in (False, True):
        ids = ByteTokenizer().encode(text, specials)
        assert ByteTokenizer().decode(ids) == text


def test_eos_in_a_document_stays_text_unless_asked(tokenizer: Tokenizer) -> None:
    eos = tokenizer.decode([tokenizer.eos_id])
    text = f"the {eos} cat"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.encode(text, specials=True).count(tokenizer.eos_id) == 1
    assert tokenizer.eos_id not in tokenizer.encode_batch([text])[0]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_saved_tokenizer_needs_no_other_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "saved.json")
    for path in tmp_path.glob("bpe/*"):
        path.unlink()
    again = load_tokenizer(tmp_path / "saved.json")
    assert again.encode("the cat Ü") == tokenizer.encode("the cat Ü")
    assert (again.eos_id, again.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)
    assert (again.name, again.fingerprint) == (tokenizer.name, tokenizer.fingerprint)


def test_words_have_one_id_each_and_survive_saving(tmp_path: Path) -> None:
    tokenizer = WordTokenizer(["tom", "has", "9", "pears"], "world")
    assert tokenizer.encode(" tom  has\n9 pears ") == [1, 2, 3, 4]
    assert tokenizer.decode([1, 2, 3, 0]) == "tom has 9 <eos>"
    assert tokenizer.encode("9 <eos>", specials=True) == [3, 0]
    tokenizer.save(tmp_path / "t.json")
    assert load_tokenizer(tmp_path / "t.json").fingerprint == tokenizer.fingerprint
    (tmp_path / "world.words").write_text("tom\nhas\n9\npears\n")
    assert load_tokenizer(tmp_path / "world.words").to_json() == tokenizer.to_json()


def test_an_unknown_word_is_named() -> None:
    tokenizer = WordTokenizer(["tom", "has"])
    with pytest.raises(TokenizerError, match="'apples' is not among its 2 words"):
        tokenizer.encode("tom has apples")
    with pytest.raises(TokenizerError, match="contains <eos>"):
        tokenizer.encode("tom <eos> has")


@pytest.mark.parametrize("words", [["a b"], [""], ["<eos>"], ["a", "b", "a"]])
def test_word_lists_that_cannot_work_are_refused(words: list[str]) -> None:
    with pytest.raises(TokenizerError, match=r"white space|twice"):
        WordTokenizer(words)


def test_the_fingerprint_depends_on_content_not_on_the_name() -> None:
    same, other = WordTokenizer(["a", "b"], "x"), WordTokenizer(["b", "a"], "x")
    assert WordTokenizer(["a", "b"], "y").fingerprint == same.fingerprint != other.fingerprint
    assert ByteTokenizer().fingerprint != WordTokenizer([]).fingerprint


def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(TokenizerError, match=f"id {bad}; allowed 0 to"):
            tokenizer.decode([bad])


def test_the_config_beside_the_file_says_which_token_ends(tmp_path: Path) -> None:
    path = tokenizer_json(tmp_path, ("<stop>", "<|endoftext|>"))
    assert load_tokenizer(path).decode([load_tokenizer(path).eos_id]) == "<|endoftext|>"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    assert load_tokenizer(tmp_path).decode([load_tokenizer(path).eos_id]) == "<stop>"
    assert load_tokenizer(path, eos="<|endoftext|>").eos_id != load_tokenizer(path).eos_id


def test_without_any_usual_end_token_one_must_be_named(tmp_path: Path) -> None:
    path = tokenizer_json(tmp_path, ("<halt>",))
    with pytest.raises(TokenizerError, match=r"name one .its special tokens: <halt>"):
        load_tokenizer(path)
    assert load_tokenizer(path, eos="<halt>").decode([load_tokenizer(path, "<halt>").eos_id])
    with pytest.raises(TokenizerError, match="eos '<none>' is not in its vocabulary"):
        load_tokenizer(path, eos="<none>")


def test_files_that_are_no_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no such file; allowed are 'bytes'"):
        load_tokenizer(tmp_path / "none.json")
    for text, message in (("{", "not JSON"), ("[]", "a list"), ('{"a": 1}', "not a tokenizer")):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(tmp_path / "t.json")


def test_a_changed_saved_tokenizer_is_noticed() -> None:
    saved = json.loads(json.dumps(WordTokenizer(["a", "b"]).to_json()))
    saved["definition"]["words"] = ["b", "a"]
    with pytest.raises(TokenizerError, match="the file was changed"):
        tokenizer_from_json(saved)
    with pytest.raises(TokenizerError, match="kind is 'other'; allowed are bytes"):
        tokenizer_from_json({**saved, "kind": "other"})


def test_ids_that_a_larger_model_draws_have_a_place_in_the_text() -> None:
    words = WordTokenizer(["one", "two"])
    assert words.decode_sampled([1, 2, 0]) == words.decode([1, 2, 0])
    assert words.decode_sampled([1, 9, 3, 2]) == "one \ufffd\ufffd two"
    assert ByteTokenizer().decode_sampled([104, 300, 105]) == "h\ufffdi"
    assert words.decode_sampled([]) == ""
