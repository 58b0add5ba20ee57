import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megarlx.config import (
    Config,
    ConfigError,
    ModelConfig,
    Section,
    describe,
    family_config,
    load_config,
)
from megarlx.config.allowed import element_section, section_of
from megarlx.config.describe import field_lines

SPARSE = """\
# the smallest configuration
[model]
vocab_size = 97
hidden_size = 64
heads = 4
layers = 6
intermediate_size = 128

[training]
steps = 100
sequence_length = 32
"""


def write(folder: Path, text: str, name: str = "run.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load_config(path, overrides)
    return [line.replace(f"{path}", path.name) for line in raised.value.problems]


def test_fp8_in_transformer_engine_layers_is_accepted_for_a_gpu(tmp_path):
    given = ["training.layers=te", "training.fp8=current", "training.precision=bf16"]
    training = load_config(write(tmp_path, SPARSE), given).training
    assert (training.layers, training.fp8, training.device) == ("te", "current", "auto")


def test_sparse_file_is_filled_with_defaults_and_what_follows_from_other_fields(tmp_path):
    config = load_config(write(tmp_path, SPARSE))
    assert (config.model.kv_heads, config.model.head_dim) == (4, 16)
    assert config.layout.tensor == 1
    assert config.optimizer.betas == (0.9, 0.95)


def test_resolved_json_is_the_same_each_time_and_loads_to_an_equal_configuration(tmp_path):
    sparse = write(tmp_path, SPARSE + '[optimizer]\nschedule = "wsd"\nbetas = [0.8, 0.99]\n')
    config = load_config(
        sparse,
        [
            "model.family=llama3",
            "model.rope_scaling.factor=8",
            "model.rope_scaling.low_freq_factor=1",
            "model.rope_scaling.high_freq_factor=4",
            "model.rope_scaling.original_max_position=64",
        ],
    )
    resolved = write(tmp_path, config.to_json(), "resolved.json")
    assert load_config(resolved) == config
    assert (
        load_config(resolved).to_json()
        == load_config(
            sparse,
            [
                "model.rope_scaling={factor=8, low_freq_factor=1, high_freq_factor=4, "
                "original_max_position=64}",
                'model.family="llama3"',
            ],
        ).to_json()
    )
    assert json.loads(config.to_json())["optimizer"]["betas"] == [0.8, 0.99]


def test_configuration_is_frozen(tmp_path):
    config = load_config(write(tmp_path, SPARSE))
    with pytest.raises(ValidationError):
        config.training.steps = 3


@pytest.mark.parametrize(
    ("family", "norm_position", "qk_norm", "qkv_bias", "tied_embeddings"),
    [
        ("olmo2", "post", "full", False, False),
        ("llama3", "pre", "none", False, False),
        ("qwen2", "pre", "none", True, True),
        ("qwen3", "pre", "per_head", False, True),
    ],
)
def test_family_sets_its_form_and_a_given_key_wins_over_it(
    family, norm_position, qk_norm, qkv_bias, tied_embeddings
):
    sizes = {"vocab_size": 5, "hidden_size": 12, "layers": 1, "heads": 3, "intermediate_size": 7}
    model = ModelConfig(family=family, **sizes)
    assert (model.norm_position, model.qk_norm) == (norm_position, qk_norm)
    assert (model.qkv_bias, model.tied_embeddings) == (qkv_bias, tied_embeddings)
    other = ModelConfig(family=family, tied_embeddings=not tied_embeddings, **sizes)
    assert other.tied_embeddings is not tied_embeddings
    assert ModelConfig.model_validate_json(other.to_json()) == other


@given(vocab=st.integers(1, 300_000), tensor=st.integers(1, 16))
def test_padded_vocabulary_is_the_least_that_gives_each_rank_whole_tiles(vocab, tensor):
    sizes = {"hidden_size": 2, "layers": 1, "heads": 1, "intermediate_size": 1}
    padded = ModelConfig(vocab_size=vocab, **sizes).padded_vocab(tensor)
    assert padded >= vocab
    assert padded % (128 * tensor) == 0
    assert padded - vocab < 128 * tensor


@pytest.mark.parametrize(
    ("family", "changes", "parameters"),
    [
        # 2 tables of 5 x 12, a last norm of 12, and for each of 2 layers: q and o 12 x 18 and
        # k and v 12 x 6 (3 query heads and 1 key head of 6), an MLP of 3 x 12 x 7, 2 norms of 12
        ("llama3", {}, 2 * 60 + 12 + 2 * (2 * 216 + 2 * 72 + 252 + 24)),
        ("olmo2", {}, 2 * 60 + 12 + 2 * (2 * 216 + 2 * 72 + 252 + 24 + 18 + 6)),
        ("qwen2", {}, 60 + 12 + 2 * (2 * 216 + 2 * 72 + 252 + 24 + 18 + 6 + 6)),
        ("qwen3", {"tied_embeddings": False}, 2 * 60 + 12 + 2 * (2 * 216 + 2 * 72 + 252 + 24 + 12)),
    ],
)
def test_parameters_are_those_of_the_family_counted_by_hand(family, changes, parameters):
    sizes = {"vocab_size": 5, "hidden_size": 12, "layers": 2, "intermediate_size": 7}
    model = family_config(family, heads=3, kv_heads=1, head_dim=6, **sizes, **changes)
    assert model.parameters() == parameters
    tables = 60 if model.tied_embeddings else 120
    assert model.non_embedding_parameters() == parameters - tables
    attention = 3 * 2 * 2 * 2 * 3 * 6 * (9 + 1) / 2
    assert model.flops_per_token(9) == 6 * (parameters - tables + 60) + attention


def test_head_dim_must_be_given_where_it_does_not_follow(tmp_path):
    path = write(tmp_path, SPARSE)
    (line,) = problems(path, "model.heads=5", "model.hidden_size=64")
    assert "model.head_dim is missing, and its default, hidden_size / heads" in line
    load_config(path, ["model.heads=5", "model.head_dim=16"])


# Errors -------------------------------------------------------------------------------------------


def test_unknown_key_names_file_line_key_and_the_nearest_key(tmp_path):
    path = write(tmp_path, SPARSE.replace("layers = 6", "layers = 6\nintermediat_size = 3"))
    assert problems(path) == [
        "run.toml:7: model.intermediat_size: unknown key; did you mean 'model.intermediate_size'?"
    ]


def test_key_of_another_table_is_said_to_belong_there(tmp_path):
    path = write(tmp_path, SPARSE.replace("layers = 6", "layers = 6\nwarmup_steps = 3"))
    assert problems(path) == [
        "run.toml:7: model.warmup_steps: unknown key; did you mean 'optimizer.warmup_steps'?"
    ]


def test_a_recipe_is_told_to_be_one_and_of_what_is_missing_only_what_a_run_does_not_give(tmp_path):
    recipe = write(
        tmp_path,
        """[[stages]]
        steps = 4
        [stages.objectives.pretraining]
        lr = -1.0
        """,
    )
    first, *others = problems(recipe)
    assert "run.toml has no [model]: it is a recipe, whose model is that of the run" in first
    assert not any("is missing" in one for one in others)
    assert any("lr is -1.0" in one for one in others)


def test_a_sweep_is_told_to_be_one(tmp_path):
    assert problems(write(tmp_path, 'out = "runs/x"\ntrunk = "trunk.toml"\nseeds = [1]\n')) == [
        "run.toml is a sweep: megarlx sweep run.toml"
    ]


def test_unknown_table_names_the_nearest_table_and_a_hopeless_one_lists_them(tmp_path):
    path = write(tmp_path, SPARSE + "[layuot]\n[zzz]\n")
    assert problems(path) == [
        "run.toml:12: layuot: unknown key; did you mean 'layout'?",
        "run.toml:13: zzz: unknown key; allowed are model, layout, optimizer, training, data, "
        "template, templates, sft, rl, objectives, stages, evaluation, checkpoints, logging",
    ]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ('[[data.sources]]\nname = "a"\n', "run.toml:12: data.sources[0].prefix is missing"),
        (
            '[[data.sources]]\nname = "a"\nprefix = "p"\nwieght = 2\n',
            "run.toml:15: data.sources[0].wieght: unknown key; did you mean",
        ),
        (
            '[[data.sources]]\nname = "a"\nprefix = "p"\n[[data.sources]]\nname = "a"\n'
            'prefix = "q"\n',
            "data.sources uses the name a more than once",
        ),
        (
            '[[data.sources]]\nname = "a"\nprefix = "p"\n[[data.composition]]\nfrom_tokens = 0\n'
            "weights = { b = 1.0 }\n",
            "data.composition names b; sources are a",
        ),
        (
            '[[data.sources]]\nname = "a"\nprefix = "p"\n[[data.composition]]\nfrom_tokens = 0\n'
            "weights = { a = -1.0 }\n",
            "weights.a is -1.0; expected a number of at least 0",
        ),
    ],
)
def test_errors_inside_lists_of_tables_name_the_table(tmp_path, data, said):
    assert said in "\n".join(problems(write(tmp_path, SPARSE + data)))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('tensor = "2"', 'layout.tensor is "2"; expected an integer of at least 1'),
        ("tensor = true", "layout.tensor is true; expected an integer of at least 1"),
        ("tensor = 1.0", "layout.tensor is 1.0; expected an integer of at least 1"),
        ("tensor = 0", "layout.tensor is 0; expected an integer of at least 1"),
        (
            'schedule = "1f2b"',
            'layout.schedule is "1f2b"; '
            'expected one of "1f1b", "interleaved", "zero_bubble", "zbv"',
        ),
        ("sequence_parallel = 1", "layout.sequence_parallel is 1; expected true or false"),
        ("time_limit_seconds = nan", "layout.time_limit_seconds is NaN; expected a number above 0"),
        ("time_limit_seconds = 1979-05-27", "layout.time_limit_seconds is 1979-05-27; expected a"),
        (
            "layers_per_stage = [\n  3,\n  -1]",
            "layout.layers_per_stage[1] is -1; expected an integer of at least 0",
        ),
        (
            "layers_per_stage = 3",
            "layout.layers_per_stage is 3; expected a list of values, each an integer of at least",
        ),
    ],
)
def test_wrong_value_says_what_was_given_and_what_is_allowed(tmp_path, line, said):
    path = write(tmp_path, SPARSE + "\n[layout]\n" + line + "\n")
    (problem,) = problems(path)
    assert problem.startswith(f"run.toml:{14 + line.count(chr(10))}: {said}")


def test_section_that_is_no_table_is_refused_with_its_keys(tmp_path):
    (line,) = problems(write(tmp_path, "layout = 3\n" + SPARSE))
    assert line.startswith("run.toml:1: layout is 3; expected a table with the keys tensor, ")


def test_all_errors_are_told_at_once_in_the_order_of_the_file(tmp_path):
    text = SPARSE.replace("heads = 4", "kv_heads = 0\nheads = 'four'").replace(
        "sequence_length = 32\n", ""
    )
    lines = problems(write(tmp_path, text), "optimizer.lr=-1", "optimizer.lrr=3")
    assert [line.split(" ")[:2] for line in lines] == [
        ["run.toml:5:", "model.kv_heads"],
        ["run.toml:6:", "model.heads"],
        ["run.toml:10:", "training.sequence_length"],
        ["--set", "optimizer.lr=-1:"],
        ["--set", "optimizer.lrr=3:"],
    ]


def test_missing_key_is_told_with_its_meaning(tmp_path):
    (line,) = problems(write(tmp_path, SPARSE.replace("vocab_size = 97\n", "")))
    assert line == (
        "run.toml:2: model.vocab_size is missing: Token ids of the tokenizer, padding not counted "
        "(an integer of at least 1)"
    )
    assert problems(write(tmp_path, ""))[0].startswith("run.toml: model is missing: ")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.kv_heads=3"], "model.kv_heads is 3; it must divide heads = 4, as 1 does"),
        (["training.sequence_length=5000"], "training.sequence_length is 5000; model.max_seque"),
        (["layout.pipeline=7"], "layout.pipeline x virtual_stages = 7 stages; model.layers = 6"),
        (["layout.schedule=zero_bubble"], "layout.schedule is 'zero_bubble'; it needs pipeline"),
        (["layout.virtual_stages=2"], "layout.virtual_stages is 2; with schedule = '1f1b'"),
        (["layout.schedule=interleaved", "layout.pipeline=2"], "layout.virtual_stages is 1; with"),
        (
            ["layout.schedule=zbv", "layout.pipeline=2", "layout.virtual_stages=3"],
            "layout.virtual_stages is 3; with schedule = 'zbv' allowed is 2",
        ),
        (["layout.layers_per_stage=[3, 3]"], "layout.layers_per_stage has 2 entries; pipeline x"),
        (["layout.layers_per_stage=[5]"], "layout.layers_per_stage adds up to 5; model.layers is"),
        (["training.sequences_per_microbatch=3"], "training.sequences_per_step is 16; sequences_p"),
        (["layout.data=3"], "training.sequences_per_step is 16; sequences_per_microbatch x layout"),
        (["optimizer.warmup_steps=101"], "optimizer.warmup_steps + decay_steps = 101; training"),
        (["training.layers=te", "training.device=cpu"], "training.layers is 'te', Transformer"),
        (
            ["training.fp8=delayed", "training.layers=torch"],
            "training.fp8 is 'delayed' with layers = 'torch' and precision",
        ),
        (["training.fp8=current", "training.precision=fp32"], "it needs 'te' and 'bf16'"),
        (["optimizer.decay_steps=10"], "optimizer.decay_steps is used by schedule = 'wsd' only"),
        (
            [
                "model.rope_scaling={factor=8, low_freq_factor=4, high_freq_factor=4, "
                "original_max_position=9}"
            ],
            "model.rope_scaling.high_freq_factor is 4.0; it must be larger than low_freq_factor",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_refused_with_both_numbers(tmp_path, overrides, said):
    (line,) = problems(write(tmp_path, SPARSE), *overrides)
    assert said in line


# Overrides ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("training.steps=7", lambda c: c.training.steps == 7),
        ("training.device=cuda", lambda c: c.training.device == "cuda"),
        ("training.device='cpu'", lambda c: c.training.device == "cpu"),
        ("layout.schedule=1f1b", lambda c: c.layout.schedule == "1f1b"),
        ("layout.sequence_parallel=true", lambda c: c.layout.sequence_parallel is True),
        ("optimizer.betas=[0.5, 0.75]", lambda c: c.optimizer.betas == (0.5, 0.75)),
        ("optimizer.lr = 1e-3", lambda c: c.optimizer.lr == 1e-3),
        ("optimizer.lr=1", lambda c: c.optimizer.lr == 1.0),
    ],
)
def test_override_is_read_as_toml_or_as_a_bare_word(tmp_path, override, read):
    assert read(load_config(write(tmp_path, SPARSE), [override]))


def test_last_override_of_a_key_wins(tmp_path):
    path = write(tmp_path, SPARSE)
    assert load_config(path, ["training.steps=7", "training.steps=8"]).training.steps == 8


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("training..steps=3", "expected key=value"),
        ("optimizer.betas=[0.5, 0.7", "neither a TOML value nor a bare word"),
        ("training.steps=3\nmodel = 2", "neither a TOML value nor a bare word"),
        ("training.steps=", "neither a TOML value nor a bare word"),
        ("training.steps.x=3", "training.steps is 100, which has no keys"),
        ("training.stepz=3", "did you mean 'training.steps'?"),
        ("training.steps=many", 'training.steps is "many"; expected an integer'),
    ],
)
def test_bad_override_is_named_as_it_was_given(tmp_path, override, said):
    (line,) = problems(write(tmp_path, SPARSE), override)
    assert line.startswith(f"--set {override}: ")
    assert said in line


def test_override_reaches_into_a_list_and_says_how_long_it_is(tmp_path):
    path = write(tmp_path, SPARSE + "[optimizer]\nbetas = [0.5, 0.6]\n")
    assert load_config(path, ["optimizer.betas.1=0.7"]).optimizer.betas == (0.5, 0.7)
    (line,) = problems(path, "optimizer.betas.2=0.7")
    assert "optimizer.betas is a list of 2, counted from 0" in line


def test_a_mark_before_the_text_of_a_file_is_no_key(tmp_path):
    path = tmp_path / "marked.toml"
    path.write_bytes(b"\xef\xbb\xbf" + write(tmp_path, SPARSE).read_bytes().replace(b"\n", b"\r\n"))
    assert load_config(path) == load_config(write(tmp_path, SPARSE))


# Files that are none ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.toml", b"[model\n", "a.toml:1: is not valid TOML"),
        ("a.toml", b"\xff\xfe", "a.toml: is not UTF-8 text (byte 0)"),
        ("a.toml", b"x = " + b"[" * 5000, "a.toml: "),
        ("a.toml", b"x = " + b"9" * 5000, "a.toml: is not valid TOML"),
        ("a.toml", b"a = 1\na = 2", "a.toml:2: is not valid TOML"),
        ("a.json", b"{", "a.json:1: is not valid JSON"),
        ("a.json", b"[1]", "a.json: holds no object but [1]"),
        ("a.json", b"[" * 100_000, "a.json: "),
    ],
)
def test_file_that_cannot_be_parsed_is_named_with_the_reason(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    (line,) = problems(path)
    assert line.startswith(said)


def test_missing_file_is_named(tmp_path):
    assert problems(tmp_path / "none.toml") == [
        "none.toml: cannot be read: No such file or directory"
    ]


# Fuzz ---------------------------------------------------------------------------------------------

KEYS = [line.name for line in field_lines(Config)] + ["model", "layout", "layout.x", "y", "z.z"]
SCALARS = st.one_of(
    st.integers(),
    st.integers(-3, 200),
    st.sampled_from([10**400, -(2**63), 2**63]),
    st.floats(allow_nan=False).map(repr),
    st.sampled_from(["true", "nan", "-inf", "1979-05-27", "07:32:00", '"""\n"""', "{}", "[]"]),
    st.sampled_from(['"pre"', '"wsd"', '"1f1b"', '"qwen2"', '"é\\n"', "'x'"]),
).map(str)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda v: "[" + ", ".join(v) + "]"),
        inner.map(lambda v: "{ a = " + v + " }"),
        inner.map(lambda v: "{ factor = " + v + ", a.b = 3 }"),
    ),
    max_leaves=4,
)
LINES = st.one_of(
    st.tuples(st.sampled_from(KEYS), VALUES).map(" = ".join),
    st.sampled_from(["[model]", "[layout]", "[[layout]]", "[[a.b]]", "[training]", "# = [", ""]),
    st.text(alphabet="[]{}=.,#\"'\\\n ab1-_", max_size=12),
)


def check_clear_error_or_configuration(path: Path, overrides: list[str]) -> None:
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        said = error.problems
    else:
        assert Config.model_validate_json(config.to_json()) == config
        return
    assert said
    for line in said:
        assert line.startswith((str(path), "--set ")), line
        assert "pydantic" not in line


@settings(max_examples=400, deadline=None)
@given(lines=st.lists(LINES, max_size=8), sparse=st.booleans())
def test_any_text_gives_a_clear_error_or_a_valid_configuration(tmp_path_factory, lines, sparse):
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_text("\n".join([*lines, SPARSE] if sparse else lines), encoding="utf-8")
    check_clear_error_or_configuration(path, [])


@settings(max_examples=300, deadline=None)
@given(
    overrides=st.lists(
        st.one_of(
            st.tuples(st.sampled_from(KEYS), VALUES).map("=".join),
            st.text(max_size=12),
            st.text(alphabet="model.layers=0123[]{}\"' \n", max_size=20),
        ),
        max_size=4,
    )
)
@example(overrides=["model.hidden_size=1" + "0" * 400])
def test_any_overrides_give_a_clear_error_or_a_valid_configuration(tmp_path_factory, overrides):
    path = tmp_path_factory.getbasetemp() / "fuzz_overrides.toml"
    path.write_text(SPARSE)
    check_clear_error_or_configuration(path, overrides)


# Descriptions -------------------------------------------------------------------------------------


def sections(kind: type[Section]) -> list[type[Section]]:
    """Each once, though some stand in several places."""
    kinds = [field.annotation for field in kind.model_fields.values()]
    below = [section_of(kind) or element_section(kind) for kind in kinds]
    return list(dict.fromkeys([kind, *(s for b in below if b is not None for s in sections(b))]))


@pytest.mark.parametrize("section", sections(Config), ids=lambda s: s.__name__)
def test_every_field_has_a_one_line_description(section):
    for name, field in section.model_fields.items():
        assert field.description, f"{section.__name__}.{name}"
        assert "\n" not in field.description
        assert len(field.description) <= 100


@pytest.mark.parametrize("rich", [False, True])
def test_description_tells_each_key_its_default_and_what_is_allowed(rich, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = describe(Config, rich=rich)
    for line in field_lines(Config):
        for part in dataclasses.astuple(line):
            assert part in text or rich, part
        assert line.name in text


# One of everything that is not there by default, with nothing in it that could be left out.
ONE_OF_EACH = """
[template]
user = "{content}"
[templates.other]
user = "{content}"
[sft]
[rl.environment]
function = "shop"
[[rl.rewards]]
function = "final_number"
[objectives.taught.distill]
teachers = ["run@1"]
[objectives.mine.own]
function = "mine:Objective"
[objectives.other_sft.sft]
[objectives.other_rl.rl.environment]
function = "shop"
[[objectives.other_rl.rl.rewards]]
function = "final_number"
[[data.sources]]
name = "web"
prefix = "p"
[[data.validation]]
name = "held"
prefix = "q"
[[data.composition]]
from_tokens = 0
weights = { web = 1.0 }
[[evaluation.suites]]
name = "sums"
kind = "pass_at_k"
path = "p"
[[evaluation.suites.rewards]]
function = "final_number"
[[stages]]
steps = 200
combine = "average"
sync_every = 2
[stages.outer]
[stages.adaptive]
[stages.objectives.pretraining]
protect = { run = "run@1" }
[stages.objectives.sft]
lr = 4e-4
"""
SET_ABOVE = {
    *("data.sources", "data.composition", "data.validation", "stages", "objectives"),
    *("rl.rewards", "objectives.NAME.rl.rewards", "stages[].combine"),
    *("stages[].sync_every", "templates"),
    *("evaluation.suites", "evaluation.suites[].rewards"),
}
# These go without data.sources, with one kind of suite only, and without an environment.
ELSEWHERE = (
    *("data.options(", "evaluation.suites[].environment."),
    *("rl.bank.", "objectives.NAME.rl.bank."),
)


def found_at(value: Any, key: str) -> Any:
    """What stands under a key of the description, where [] is any entry and NAME any name."""
    name, _, rest = key.partition(".")
    if name == "NAME":
        tables = [v for v in value.values() if v.get(rest.partition(".")[0]) is not None]
        return found_at(tables[0], rest)
    value = value[name.removesuffix("[]")]
    value = value[0] if name.endswith("[]") else value
    return found_at(value, rest) if rest else value


def test_defaults_in_the_description_are_the_defaults_in_use(tmp_path):
    text = SPARSE.replace("steps = 100\n", "") + ONE_OF_EACH
    resolved = json.loads(load_config(write(tmp_path, text)).to_json())
    compared = 0
    for line in field_lines(Config):
        if line.default.startswith("(") or line.name in SET_ABOVE:
            continue
        if line.name.startswith(ELSEWHERE):
            continue
        assert json.loads(line.default) == found_at(resolved, line.name), line.name
        compared += 1
    assert compared > 130


def test_sparse_example_is_toml_that_needs_every_one_of_its_keys(tmp_path):
    for section, keys in tomllib.loads(SPARSE).items():
        for key in keys:
            kept = [line for line in SPARSE.splitlines() if not line.startswith(f"{key} ")]
            (line,) = problems(write(tmp_path, "\n".join(kept)))
            assert f"{section}.{key} is missing" in line
