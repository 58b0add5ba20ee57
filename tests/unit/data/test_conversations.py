import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarlx.data.conversations import (
    Conversation,
    ConversationError,
    Frames,
    Turn,
    choose_demonstrations,
    read_conversations,
)
from megarlx.data.documents import BadLineError
from megarlx.data.loader import BatchLayout, Loader
from megarlx.data.packing import ConversationData, pack
from megarlx.data.tokenizer import ByteTokenizer, TokenizerError, WordTokenizer

BYTES = ByteTokenizer()
WORDS = WordTokenizer(["question", "answer", ":", "how", "many", "?", "9", "pears", "####", "4"])
TEMPLATE = Frames("question : {content} answer :")


def qa(question: str, answer: str) -> Conversation:
    return Conversation((Turn("user", question), Turn("assistant", answer)))


def test_only_the_answer_and_its_stop_token_are_learned() -> None:
    ids, learned = TEMPLATE.encode(qa("how many ?", "#### 4"), WORDS)
    assert WORDS.decode(ids) == "question : how many ? answer : #### 4 <eos>"
    assert WORDS.decode([i for i, m in zip(ids, learned, strict=True) if m]) == "#### 4 <eos>"


def test_every_answer_of_a_conversation_is_learned_and_what_is_given_is_not() -> None:
    template = Frames("U{content}\n", "S{content}\n", "A:", "{content}")
    turns = (Turn("system", "be kind"), Turn("user", "hi"), Turn("assistant", "hello"))
    conversation = Conversation((*turns, Turn("user", "and?"), Turn("assistant", "bye")))
    ids, learned = template.encode(conversation, BYTES)
    assert BYTES.decode(ids) == "Sbe kind\nUhi\nA:hello<eos>Uand?\nA:bye<eos>"
    said = [i for i, m in zip(ids, learned, strict=True) if m]
    assert BYTES.decode(said) == "hello<eos>bye<eos>"


def test_the_prompt_has_the_ids_that_training_showed() -> None:
    for template in (TEMPLATE, Frames("Q{content}", opening="A:"), Frames("<eos>{content}")):
        conversation = qa("how many ?", "4")
        tokenizer = BYTES
        prompt = template.prompt_ids(conversation.question, tokenizer)
        ids, learned = template.encode(conversation, tokenizer)
        assert ids[: len(prompt)] == prompt
        assert learned == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


def reserving(count: int) -> ByteTokenizer:
    tokenizer = ByteTokenizer()
    tokenizer.reserved = count
    return tokenizer


texts = st.text("<>_reservd012 \n", max_size=12) | st.sampled_from(
    ["<reserved_0>", "<reserved_1>a"]
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(texts, texts, st.booleans())
def test_reserved_tokens_appear_only_where_the_template_puts_them(
    question: str, answer: str, in_answers: bool
) -> None:
    tokenizer = reserving(2)
    said = "<reserved_1>{content}" if in_answers else " {content}"
    template = Frames("<reserved_0>Q: {content}\n", assistant=said)
    turns = (Turn("user", question), Turn("assistant", answer)) * 2
    ids, learned = template.encode(Conversation(turns), tokenizer)
    mode, other = tokenizer.vocab_size, tokenizer.vocab_size + 1
    each = [i for i in ids if i >= tokenizer.vocab_size]
    assert each == ([mode, other] if in_answers else [mode]) * 2
    assert ids[0] == mode
    assert not learned[0]
    plain = Frames("Q: {content}\n").encode(Conversation(turns), tokenizer)[0]
    assert max(plain) < tokenizer.vocab_size


def test_a_reserved_token_that_the_model_does_not_have_is_refused() -> None:
    for count, names in ((0, "none"), (2, "<reserved_0>, <reserved_1>")):
        with pytest.raises(TokenizerError, match=rf"writes <reserved_2>; the model has {names}:"):
            Frames("<reserved_2>{content}").prompt_ids((Turn("user", "a"),), reserving(count))


def test_special_tokens_come_from_the_template_only() -> None:
    ids, learned = Frames("<eos>{content}").encode(qa("a<eos>b", "c<eos>d"), BYTES)
    assert ids.count(BYTES.eos_id) == 2  # the template's and the stop token
    assert sum(learned) == len(" c<eos>d") + 1


def test_templates_without_a_place_for_the_content_are_refused() -> None:
    with pytest.raises(ConversationError, match="user is 'x'; it must hold"):
        Frames(user="x")


def lines(path: Path, *values: object) -> Path:
    path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values))
    return path


def test_every_form_of_a_line_is_read(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = lines(
        tmp_path / "a.jsonl",
        {"messages": messages},
        {"question": "q", "answer": "a", "more": 1},
        "",
        {"question": "q", "answers": ["b", "c"]},
        {"prompt": "q", "completion": "d", "text": "unused"},
        {"prompt": messages[:1], "completion": [{"role": "assistant", "content": "e"}]},
        {"question": "q", "answer": 7},
        {"text": "whole"},
    )
    *found, text = read_conversations(path)
    assert found == [qa("q", x) for x in ("a", "a", "b", "c", "d", "e", "7")]
    assert text == Conversation((Turn("text", "whole"),))


def test_a_text_is_learned_whole_and_in_no_template() -> None:
    texts = [Conversation((Turn("text", text),)) for text in ("how many ?", "9 pears")]
    data = ConversationData(texts, TEMPLATE, WORDS, 8, 0)
    assert data.conversations == 2
    sample = data.sample(0)
    learned = WORDS.decode(sample.targets[sample.mask].tolist())
    # A document's first token is no target.
    assert sorted(part.strip() for part in learned.split("<eos>")) == ["", "many ?", "pears"]


def test_turns_of_tools_are_given_and_their_calls_are_learned(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    (read,) = read_conversations(lines(tmp_path / "a.jsonl", {"messages": messages}))
    template = Frames("U{content}\n", opening="A:", assistant="{content}", tool="T{content}\n")
    ids, learned = template.encode(read, BYTES)
    said = BYTES.decode([i for i, m in zip(ids, learned, strict=True) if m])
    assert said == json.dumps([call]) + "<eos>It is 2.<eos>"
    given = BYTES.decode([i for i, m in zip(ids, learned, strict=True) if not m])
    assert given == "U1 + 1?\nA:T2\nA:"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("{", "not JSON"),
        ([], "holds a list; expected an object"),
        ({"question": "q"}, r"has none of 'messages', 'question' with .*its keys: question"),
        ({"question": 1, "answer": "a"}, "'question' is int; expected a string"),
        ({"question": "q", "answers": []}, "must be a list of at least one answer"),
        ({"question": "q", "answers": ["a", None]}, "answer 1 is NoneType"),
        ({"messages": []}, "must be a list of at least one message"),
        ({"messages": [{"role": "user"}]}, "message 0 must be an object with role and content"),
        ({"messages": [{"role": "bot", "content": ""}]}, "role 'bot'; allowed system, user, ass"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
            "only the assistant",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": "f"}]}, "must be a list of objects"),
        ({"prompt": "x", "completion": 3}, "'completion' is int; expected a string"),
        ({"text": 3}, "'text' is int; expected a string"),
        ({"messages": [{"role": "user", "content": "x"}]}, "the last message is the user's"),
        ('{"question": "\\ud800", "answer": "a"}', "half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_or_skipped(tmp_path: Path, value: object, reason: str) -> None:
    good = {"question": "q", "answer": "a"}
    path = lines(tmp_path / "a.jsonl", good, value, good)
    with pytest.raises(BadLineError, match=rf"a\.jsonl, line 2: .*{reason}"):
        list(read_conversations(path))
    skipped: list[BadLineError] = []
    assert len(list(read_conversations(path, on_bad_line="skip", skipped=skipped))) == 2
    assert len(skipped) == 1


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=120) | st.text('{}[]",:questionanwrmg 1\\u', max_size=60))
def test_any_bytes_give_conversations_or_a_named_line(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes | str
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    skipped: list[BadLineError] = []
    conversations = list(read_conversations(path, on_bad_line="skip", skipped=skipped))
    # No line is lost: it is empty, one or more conversations, or named.
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    assert len(conversations) + len(skipped) >= len(lines)
    assert all(f"{path}, line " in str(bad) for bad in skipped)


def test_one_demonstration_a_question_is_seeded_and_independent_of_the_others() -> None:
    many = [qa(f"q{i}", f"a{i}.{j}") for i in range(60) for j in range(4)]
    one = choose_demonstrations(many, "one", seed=1)
    assert [c.question for c in one] == [qa(f"q{i}", "").question for i in range(60)]
    assert one == choose_demonstrations(many, "one", seed=1)
    assert one != choose_demonstrations(many, "one", seed=2)
    assert one[30:] == choose_demonstrations(many[120:], "one", seed=1)
    picks = [int(c.turns[-1].content.split(".")[1]) for c in one]
    assert set(picks) == {0, 1, 2, 3}
    assert choose_demonstrations(many, "all", seed=1) == many


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(1, 70))
def test_packs_hold_every_item_once_and_never_too_much(lengths: list[int], window: int) -> None:
    packs = pack(lengths, 20, window)
    assert sorted(i for items in packs for i in items) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in items) <= 20 for items in packs)
    if window >= len(lengths):  # first-fit decreasing: at most one pack is not half full
        assert sum(sum(lengths[i] for i in items) <= 10 for items in packs) <= 1
    assert packs == pack(lengths, 20, window)


def data(seed: int = 0, count: int = 40, **changes: object) -> ConversationData:
    made = [qa("q" * (1 + i % 7), f"a{i}") for i in range(count)]
    arguments = {"demonstrations": "all", "sequence_length": 60, **changes}
    return ConversationData(made, Frames("{content}>"), tokenizer=BYTES, seed=seed, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_holds_every_conversation_once_without_leaks(packing: bool) -> None:
    dataset = data(packing=packing)
    per_epoch = dataset.sequences_in_epochs(1)
    assert (per_epoch == 40) is not packing
    for epoch in (0, 1):
        seen = []
        for place in range(per_epoch if epoch == 0 else dataset.sequences_in_epochs(2) - per_epoch):
            sample = dataset.sample(epoch * per_epoch + place)
            assert sample.mask is not None
            assert sum(sample.document_lengths) == 60
            at = 0
            for length in sample.document_lengths:
                part = slice(at, at + length)
                at += length
                said = sample.targets[part][sample.mask[part]]
                if not said.size:  # the padding
                    assert at == 60
                    continue
                # One conversation: its question in the inputs, its whole answer in the targets.
                text = BYTES.decode([*sample.inputs[part].tolist(), int(sample.targets[part][-1])])
                question, answer = text.split("> ")
                assert set(question) == {"q"}
                assert BYTES.decode(said.tolist()) == f" {answer}"
                assert answer.endswith("<eos>")
                seen.append(answer)
        assert sorted(seen) == sorted(f"a{i}<eos>" for i in range(40))


def test_epochs_differ_in_order_and_seeds_in_everything() -> None:
    dataset = data(packing=False)
    first, second = (
        [dataset.sample(e * 40 + i).targets.tolist() for i in range(40)] for e in (0, 1)
    )
    assert first != second
    assert sorted(first) == sorted(second)
    assert first != [data(seed=1, packing=False).sample(i).targets.tolist() for i in range(40)]


def test_a_run_resumed_at_any_step_sees_the_same_sequences() -> None:
    def steps(loader: Loader, count: int) -> list[list[int]]:
        return [row for _ in range(count) for b in loader.next_step() for row in b.targets.tolist()]

    per_epoch = data().sequences_in_epochs(1)
    whole = steps(Loader(data(), BatchLayout(1, 1), prefetch_steps=0), 3 * per_epoch)
    for cut in (1, per_epoch - 1, per_epoch, per_epoch + 1, 2 * per_epoch):
        first = Loader(data(), BatchLayout(1, 1))
        before = steps(first, cut)
        second = Loader(data(), BatchLayout(1, 1))
        second.load_state(json.loads(json.dumps(first.state())))
        assert before + steps(second, 3 * per_epoch - cut) == whole
        first.close()
        second.close()


def test_tokens_are_counted_without_padding() -> None:
    dataset = data()
    per_epoch = dataset.sequences_in_epochs(1)
    total = sum(
        len(Frames("{content}>").encode(qa("q" * (1 + i % 7), f"a{i}"), BYTES)[0]) - 1
        for i in range(40)
    )
    assert dataset.tokens_by_source(0) == {"sft": 0}
    assert dataset.tokens_by_source(per_epoch) == {"sft": total}
    assert dataset.tokens_by_source(2 * per_epoch)["sft"] <= 2 * total
    fresh = data()  # asked first, before any sample
    assert fresh.tokens_by_source(per_epoch + 1) == dataset.tokens_by_source(per_epoch + 1)
    assert total < fresh.tokens_by_source(per_epoch + 1)["sft"] < 2 * total


def test_a_conversation_that_is_too_long_is_named_or_counted() -> None:
    with pytest.raises(ConversationError, match=r"begins 'qqqqqqq': has 13 tokens; .* allows 12"):
        data(sequence_length=11)
    dataset = data(sequence_length=11, too_long="skip")
    assert dataset.conversations + dataset.too_long == 40
    assert dataset.too_long > 0
    with pytest.raises(ConversationError, match=r"no conversation to learn from .40 were too long"):
        data(sequence_length=2, too_long="skip")


def test_the_fingerprint_sees_content_template_and_choice() -> None:
    base = data().fingerprint()
    assert base == data().fingerprint()
    for other in (data(seed=1), data(count=39), data(packing=False), data(demonstrations="one")):
        assert other.fingerprint() != base
    assert json.loads(json.dumps(base)) == base


def test_masks_reach_the_batch_as_they_are() -> None:
    [batch] = Loader(data(), BatchLayout(3, 3), with_documents=True, prefetch_steps=0).next_step()
    assert batch.mask is not None
    assert batch.cu_seqlens is not None
    assert batch.mask.shape == (3, 60)
    expected = np.stack([data().sample(i).mask for i in range(3)])  # type: ignore[misc]
    assert batch.mask.numpy().tolist() == expected.tolist()
    assert batch.cu_seqlens[-1] == 180
