"""What was expected is bound to the configurations by a hash."""

import shutil
from pathlib import Path

import pytest

from megarlx.cli import main
from megarlx.study.expected import PAGE, settings_hash, stated_hash

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the configurations, in a folder that commands are called in."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "configs"


def change(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("recipes/rl.toml", "steps = 80", "steps = 81"),
        ("recipes/sft_gold.toml", 'demonstrations = "all"', 'demonstrations = "one"'),
        ("recipes/parallel.toml", "weight.first = 0.5", "weight.first = 0.25"),
        ("study_trunk.toml", "lr = 4e-3", "lr = 6e-3"),
        ("study_trunk.toml", "fact_skew = 1.2", "fact_skew = 1.35"),
        ("study_trunk.toml", "samples = 32", "samples = 16"),
        ("study.toml", '"evaluation.every_steps" = 20', '"evaluation.every_steps" = 40'),
        ("composition.toml", "[64, 96]", "[64, 128]"),
        ("group_size.toml", '"rl.samples_per_prompt" = 64', '"rl.samples_per_prompt" = 32'),
    ],
)
def test_whatever_is_changed_in_what_the_claims_hang_on_changes_the_hash(
    configs: Path, file: str, before: str, after: str
) -> None:
    original = settings_hash()
    change(configs / file, before, after)
    assert settings_hash() != original


def test_seeds_folders_and_comments_leave_the_hash(
    configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = settings_hash()
    change(configs / "study.toml", "seeds = [1, 2]", "seeds = [120, 121, 122]  # fresh")
    change(configs / "study.toml", 'out = "runs/study"', 'out = "elsewhere/study"')
    change(configs / "study_trunk.toml", "log_every_steps = 50", "log_every_steps = 25")
    assert settings_hash() == original
    assert main(["study", "hash"]) == 0
    assert capsys.readouterr().out.strip() == original


def test_the_page_states_the_hash_of_the_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is written there is nothing that it could be wrong about."""
    monkeypatch.chdir(ROOT)
    text = PAGE.read_text() if PAGE.exists() else f"Settings hash: `{settings_hash()}`"
    assert stated_hash(text) == settings_hash()


@pytest.mark.parametrize("text", ["", f"settings hash {'a' * 64} settings hash {'b' * 64}"])
def test_a_page_with_no_hash_or_with_two_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="settings hashes are stated; allowed is one"):
        stated_hash(text)
