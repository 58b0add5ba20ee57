"""The token that begins a document, of a tokenizer that writes one: where it stands, and once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Engine

from megarlx.config.objectives import TemplateConfig
from megarlx.data.conversations import (
    Conversation,
    ConversationError,
    Frames,
    Turn,
    read_conversations,
    turns_of,
)
from megarlx.data.packing import ConversationData
from megarlx.data.prepare import Settings, prepare
from megarlx.data.prompts import FewShot
from megarlx.data.token_files import TokenFile
from megarlx.data.tokenizer import ByteTokenizer, FileTokenizer
from megarlx.evaluation.capability import continuation
from megarlx.evaluation.questions import Question
from megarlx.hf.tokenizer_files import chat_template

BOS, EOS, TURN_END = "<bos>", "<eos>", "<end_of_turn>"
LAYOUTS = ["$A", f"{BOS} $A", f"$A {EOS}", f"{BOS} $A {EOS}"]
FRAMES = Frames(user="Q {content}\n", opening="A:")
QUESTION, ANSWER = Turn("user", "1 + 1?"), Turn("assistant", "2")


def engine(layout: str) -> Engine:
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Engine(models.BPE(letters, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=True) for t in (BOS, EOS, TURN_END)])
    ids = [(token, made.token_to_id(token)) for token in (BOS, EOS)]
    made.post_processor = processors.TemplateProcessing(single=layout, special_tokens=ids)
    return made


def tokenizer(layout: str = LAYOUTS[1], eos: str = EOS) -> FileTokenizer:
    return FileTokenizer(json.loads(engine(layout).to_str()), eos, "made")


@given(text=st.text(min_size=1), layout=st.sampled_from(LAYOUTS))
def test_a_text_begins_as_the_tokenizer_itself_begins_it(text: str, layout: str) -> None:
    ours, theirs = tokenizer(layout), engine(layout)
    theirs.encode_special_tokens = True
    whole = [*ours.begun(ours.encode(text)), ours.eos_id]
    wanted = theirs.encode(text).ids
    assert whole == (wanted if layout.endswith(EOS) else [*wanted, ours.eos_id])
    assert ours.begun(whole) == whole


def test_prepared_documents_begin_and_end(tmp_path: Path) -> None:
    engine(LAYOUTS[1]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("one\ntwo <bos>\n")
    out = str(tmp_path / "out")
    prepare(Settings((str(tmp_path / "a.txt"),), str(tmp_path / "tokenizer.json"), out), show=False)
    ours, tokens = tokenizer(), TokenFile(out)
    for i, text in enumerate(("one", "two <bos>")):
        assert tokens[i].tolist() == [ours.bos_id, *ours.encode(text), ours.eos_id]


def test_a_prompt_is_how_its_conversation_begins_with_or_without_examples() -> None:
    ours = tokenizer()
    asked = FRAMES.prompt_ids([QUESTION], ours)
    told, learned = FRAMES.encode(Conversation((QUESTION, ANSWER)), ours)
    assert asked == told[: len(asked)] == ours.begun(asked)
    assert learned == [False] * len(asked) + [True] * (len(told) - len(asked))
    example = Conversation((Turn("user", "2 + 1?"), Turn("assistant", "3")))
    for separator in (None, "\n\n"):
        shots = FewShot((example,) * 3, separator).ids(FRAMES, ours)
        whole = [*shots, *FRAMES.prompt_ids([QUESTION], ours, follows=True)]
        assert whole[0] == ours.bos_id
        assert whole.count(ours.bos_id) == 1
    plain = Question("q", "1 + 1 =", templated=False)
    assert plain.prompt_ids(FRAMES, ours) == [ours.bos_id, *ours.encode("1 + 1 =")]
    assert plain.prompt_ids(FRAMES, ours, follows=True) == ours.encode("1 + 1 =")


def test_a_frame_that_writes_the_beginning_itself_is_begun_once() -> None:
    ours = tokenizer()
    written = Frames(user=BOS + FRAMES.user, opening=FRAMES.opening)
    assert written.prompt_ids([QUESTION], ours) == FRAMES.prompt_ids([QUESTION], ours)


def test_texts_that_are_learned_begin_as_prepared_ones(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "abc"}\n')
    ours = tokenizer()
    data = ConversationData([*read_conversations(path)], FRAMES, ours, 8, seed=0)
    one = data.sample(0)
    ids = [*one.inputs[:1], *one.targets[:4]]
    assert ids == [ours.bos_id, *ours.encode("abc"), ours.eos_id]
    assert one.mask is not None
    assert one.mask.tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("context", ["", "the sky is"])
def test_a_continuation_is_scored_behind_the_beginning(context: str) -> None:
    ours, without = tokenizer(), ByteTokenizer()
    found, bare = (continuation(one, context, " blue", 64) for one in (ours, without))
    assert list(found.tokens) == [ours.bos_id, *ours.encode(context + " blue")]
    assert list(bare.tokens) == [*([] if context else [256]), *f"{context} blue".encode()]
    assert len(found.tokens) - found.first == len(bare.tokens) - bare.first == 5


def test_an_exported_template_begins_and_ends_as_what_was_trained(tmp_path: Path) -> None:
    """The end of an answer is the run's, which need not be what the tokenizer calls eos_token."""
    transformers = pytest.importorskip("transformers")
    ours = tokenizer(eos=TURN_END)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine(LAYOUTS[1]), bos_token=BOS, eos_token=EOS
    )
    for user in (FRAMES.user, BOS + FRAMES.user):
        config = TemplateConfig(user=user, opening=FRAMES.opening)
        frames = Frames(**config.model_dump(exclude={"chat", "bos", "tokens", "date"}))
        theirs.chat_template = chat_template(config, ours)
        told: list[dict[str, Any]] = [
            {"role": t.role, "content": t.content} for t in (QUESTION, ANSWER)
        ]
        whole = theirs.apply_chat_template(told, return_dict=False)
        assert whole == frames.encode(Conversation((QUESTION, ANSWER)), ours)[0]
        asked = theirs.apply_chat_template(told[:1], add_generation_prompt=True, return_dict=False)
        assert asked == frames.prompt_ids([QUESTION], ours)


def test_messages_of_hugging_face_are_turns() -> None:
    assert turns_of([{"role": "user", "content": "1 + 1?"}, ANSWER]) == [QUESTION, ANSWER]
    with pytest.raises(ConversationError, match="message 0 has role 'human'; allowed system"):
        turns_of([{"role": "human", "content": "hi"}])
