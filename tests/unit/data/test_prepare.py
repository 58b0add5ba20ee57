import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megarlx.data.documents import BadLineError, Piece
from megarlx.data.prepare import PrepareError, Settings, Share, make_piece, marker_path, prepare
from megarlx.data.prepare_progress import Progress
from megarlx.data.token_files import TokenFile, TokenFileError, check_tokenizer
from megarlx.data.tokenizer import Tokenizer, TokenizerError, load_tokenizer

REPOSITORY = Path(__file__).resolve().parents[3]
# Beside the interpreter too: a virtual environment that is not activated has it only there.
MPIRUN = shutil.which("mpirun") or shutil.which("mpirun", path=Path(sys.executable).parent)
TOOL = REPOSITORY / "tools" / "prepare_tokens.py"


def corpus(folder: Path, lines: int = 400) -> list[Path]:
    import gzip

    texts = [f"document {i} " + "word " * (i * 7 % 23) for i in range(lines)]
    raw = "".join(json.dumps({"text": t}) + "\n" for t in texts)
    (folder / "a.jsonl").write_text(raw)
    (folder / "b.txt").write_text("\n".join(texts[: lines // 2]))
    with gzip.open(folder / "c.jsonl.gz", "wt") as stream:
        stream.write(raw)
    return [folder / "a.jsonl", folder / "b.txt", folder / "c.jsonl.gz"]


def settings_for(folder: Path, out: str, **changes: object) -> Settings:
    inputs = tuple(
        str(p) for p in sorted(folder.glob("*.*")) if p.suffix in (".jsonl", ".txt", ".gz")
    )
    base = Settings(inputs, "bytes", str(folder / out / "tokens"), piece_bytes=3000)
    return replace(base, **changes)  # type: ignore[arg-type]


def result(settings: Settings) -> tuple[bytes, ...]:
    return tuple(Path(f"{settings.out}.{x}").read_bytes() for x in ("bin", "idx", "json"))


def test_every_document_is_there_in_order_and_ends_with_eos(tmp_path: Path) -> None:
    corpus(tmp_path, 30)
    settings = settings_for(tmp_path, "out", inputs=(str(tmp_path / "a.jsonl"),))
    report = prepare(settings, show=False)
    tokens, tokenizer = TokenFile(settings.out, vocab_size=257), load_tokenizer("bytes")
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert len(tokens) == len(lines) == 30
    for i, line in enumerate(lines):
        assert tokens[i][-1] == tokenizer.eos_id
        assert tokenizer.decode(tokens[i][:-1]) == json.loads(line)["text"]
    assert report is not None
    assert (report["documents"], report["tokens"]) == (30, tokens.tokens)
    assert report["tokenizer"]["vocab_size"] == 257
    assert not Path(f"{settings.out}.pieces").exists()


def test_the_bytes_do_not_depend_on_ranks_or_processes(tmp_path: Path) -> None:
    corpus(tmp_path)
    alone = settings_for(tmp_path, "alone")
    prepare(alone, show=False)
    several = settings_for(tmp_path, "several", processes=2)
    prepare(several, show=False)
    assert result(several) == result(alone)
    # Three ranks one after the other: the first to come is rank 0's preparation, and rank 0 joins.
    ranks = settings_for(tmp_path, "ranks")
    with pytest.raises(KeyboardInterrupt):
        prepare(ranks, Share(0, 3, _interrupt), show=False)
    for rank in (2, 1):
        assert prepare(ranks, Share(rank, 3), show=False) is None
    prepare(ranks, Share(0, 3), show=False)
    assert result(ranks) == result(alone)


def test_an_input_that_was_mended_is_prepared_by_the_same_command(tmp_path: Path) -> None:
    """Unless pieces of what it was were finished: then the file that changed is named."""
    text = tmp_path / "a.jsonl"
    settings = settings_for(tmp_path, "out", inputs=(str(text),))
    good = '{"text": "whole"}\n' * 400
    for begun in ("", good):  # pieces that are finished: none, all but the last
        text.write_text(begun + '{"text": "half')
        with pytest.raises(BadLineError):
            prepare(settings, show=False)
    text.write_text(good)
    with pytest.raises(PrepareError, match=r"another job: .*a\.jsonl: not as they were\. Repeat"):
        prepare(settings, show=False)
    report = prepare(replace(settings, fresh=True), show=False)
    assert report is not None
    assert report["documents"] == 400


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(MPIRUN is None, reason="mpirun is not installed")
def test_mpirun_gives_the_same_bytes(tmp_path: Path) -> None:
    corpus(tmp_path)
    alone, under_mpi = settings_for(tmp_path, "alone"), settings_for(tmp_path, "mpi")
    prepare(alone, show=False)
    launcher = [str(MPIRUN), "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    done = tool(under_mpi, before=launcher)
    assert done.returncode == 0, done.stderr
    assert result(under_mpi) == result(alone)
    assert done.stdout.count('"documents": 1000') == 1  # one rank reports
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": 1}\n')
    failed = tool(replace(under_mpi, inputs=(str(broken),), fresh=True), before=launcher)
    assert failed.returncode != 0
    assert "broken.jsonl, line 1: 'text' is int" in failed.stderr


def command(settings: Settings) -> list[str]:
    return [
        *(sys.executable, str(TOOL), *settings.inputs, "--tokenizer", settings.tokenizer),
        *("--out", settings.out, "--piece-megabytes", str(settings.piece_bytes / (1 << 20))),
        *("--processes", str(settings.processes), "--on-bad-line", settings.on_bad_line),
        *(["--fresh"] if settings.fresh else []),
    ]


def tool(settings: Settings, before: list[str] | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [*(before or []), *command(settings)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on_where_it_was(
    tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus(tmp_path, 4000)
    whole = settings_for(tmp_path, "whole", piece_bytes=2000)
    prepare(whole, show=False)
    killed = settings_for(tmp_path, "killed", piece_bytes=2000, processes=processes)
    folder = Path(f"{killed.out}.pieces")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command(killed), env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("0*.json"))) < 5:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    time.sleep(0.5)  # workers notice within a batch that their parent is gone
    finished = {int(p.stem) for p in folder.glob("0*.json")}
    assert len(finished) >= 5
    assert not Path(f"{killed.out}.idx").exists()
    made = []

    def record(settings: Settings, tokenizer: Tokenizer, piece: Piece, number: int) -> None:
        made.append(number)
        make_piece(settings, tokenizer, piece, number)

    monkeypatch.setattr("megarlx.data.prepare.make_piece", record)
    prepare(replace(killed, processes=1), show=False)
    assert made
    assert not set(made) & finished
    assert result(killed) == result(whole)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_a_worker_that_dies_ends_the_run_with_an_error(tmp_path: Path) -> None:
    corpus(tmp_path, 40_000)
    settings = settings_for(tmp_path, "out", processes=2)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        command(settings), env=environment, stderr=subprocess.PIPE, text=True
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not list(Path(f"{settings.out}.pieces").glob("0*.json")):
        assert process.poll() is None
        time.sleep(0.005)
    workers = [
        int(child)
        for child in children.read_text().split()
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a worker process ended with exit status -9" in error
    assert not Path(f"{settings.out}.idx").exists()


def test_finished_pieces_are_not_made_again(tmp_path: Path) -> None:
    corpus(tmp_path)
    settings = settings_for(tmp_path, "out")
    with pytest.raises(KeyboardInterrupt):
        prepare(settings, Share(0, 2, _interrupt), show=False)
    prepare(settings, Share(1, 2), show=False)  # every second piece
    folder = Path(f"{settings.out}.pieces")
    # Spoilt on purpose: were the piece made again, the damage would be gone.
    bin_file = folder / "00000001.bin"
    bin_file.write_bytes(b"\xff" + bin_file.read_bytes()[1:])
    with pytest.raises(PrepareError, match="00000001: its bytes are not those its marker"):
        prepare(settings, show=False)
    assert not Path(f"{settings.out}.idx").exists()
    assert not marker_path(folder, 1).exists()
    prepare(settings, show=False)
    whole = settings_for(tmp_path, "whole")
    prepare(whole, show=False)
    assert result(settings) == result(whole)


def test_a_piece_that_is_gone_or_cut_short_is_named_and_made_anew(tmp_path: Path) -> None:
    corpus(tmp_path)
    settings = settings_for(tmp_path, "out")
    for spoil in (lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-2])):
        with pytest.raises(KeyboardInterrupt):
            prepare(settings, Share(0, 2, _interrupt), show=False)
        prepare(settings, Share(1, 2), show=False)
        spoil(Path(f"{settings.out}.pieces") / "00000003.bin")
        with pytest.raises(PrepareError, match=r"piece 3: .*00000003\.bin.*Run again"):
            prepare(settings, show=False)
    assert prepare(settings, show=False) is not None


def test_a_run_killed_while_joining_goes_on_and_leaves_no_litter(tmp_path: Path) -> None:
    corpus(tmp_path)
    settings = settings_for(tmp_path, "out")
    with pytest.raises(KeyboardInterrupt):
        prepare(settings, Share(0, 2, _interrupt), show=False)
    prepare(settings, Share(1, 2), show=False)
    folder = Path(f"{settings.out}.pieces")
    for name in ("../tokens.bin", "../tokens.idx", "00000002.bin", "00000002.json"):
        (folder / f"{name}.partial-99999").write_bytes(b"half")
    prepare(settings, show=False)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("tokens.bin", "tokens.idx", "tokens.json")
    }


def test_token_files_know_their_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n")
    settings = settings_for(tmp_path, "out")
    prepare(settings, show=False)
    check_tokenizer(settings.out, load_tokenizer("bytes").fingerprint)
    check_tokenizer(tmp_path / "other", "files of other tools pass")
    with pytest.raises(TokenFileError, match=r"tokens\.bin: made with tokenizer 'bytes' .*uses zz"):
        check_tokenizer(settings.out, "zz")


def test_the_same_job_twice_does_nothing_and_another_is_refused(tmp_path: Path) -> None:
    corpus(tmp_path)
    settings = settings_for(tmp_path, "out")
    report = prepare(settings, show=False)
    before = os.stat(f"{settings.out}.bin").st_mtime_ns
    assert prepare(settings, show=False) == report
    assert os.stat(f"{settings.out}.bin").st_mtime_ns == before
    other = replace(settings, inputs=settings.inputs[:1])
    with pytest.raises(PrepareError, match="made from other inputs or settings"):
        prepare(other, show=False)
    smaller = prepare(replace(other, fresh=True), show=False)
    assert smaller is not None
    assert report is not None
    assert smaller["documents"] < report["documents"]


def test_pieces_of_another_job_are_refused_with_the_difference(tmp_path: Path) -> None:
    corpus(tmp_path)
    settings = settings_for(tmp_path, "out")
    with pytest.raises(KeyboardInterrupt):
        prepare(settings, Share(0, 2, _interrupt), show=False)
    prepare(settings, Share(1, 2), show=False)
    with pytest.raises(PrepareError, match="piece_bytes was 3000, is 999"):
        prepare(replace(settings, piece_bytes=999), show=False)
    prepare(replace(settings, piece_bytes=999, fresh=True), show=False)


def test_token_files_of_somebody_else_are_not_overwritten(tmp_path: Path) -> None:
    corpus(tmp_path)
    settings = settings_for(tmp_path, "out")
    prepare(settings, show=False)
    Path(f"{settings.out}.json").unlink()
    with pytest.raises(PrepareError, match=r"tokens\.idx exists and was not made here"):
        prepare(settings, show=False)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_line_stops_or_is_counted(tmp_path: Path, processes: int) -> None:
    lines = ['{"text": "fine"}'] * 300
    lines[77] = lines[240] = '{"text": 3}'
    lines[5] = '{"text": "  "}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    stop = settings_for(tmp_path, "stop", piece_bytes=500, processes=processes)
    with pytest.raises(
        (BadLineError, PrepareError), match=r"a\.jsonl, line (78|241): 'text' is int"
    ):
        prepare(stop, show=False)
    skip = replace(stop, out=str(tmp_path / "skip"), on_bad_line="skip")
    report = prepare(skip, show=False)
    assert report is not None
    assert (report["documents"], report["bad_lines"], report["empty_documents"]) == (297, 2, 1)
    first, second = report["bad_examples"]
    assert "a.jsonl, line 78: " in first
    assert "a.jsonl, line 241: " in second


def test_the_tool_says_how_many_lines_it_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\nnothing\n')
    done = tool(settings_for(tmp_path, "out", on_bad_line="skip"))
    assert done.returncode == 0
    assert "skipped 1 bad lines" in done.stderr
    assert "a.jsonl, line 2: not JSON" in done.stderr
    failed = tool(settings_for(tmp_path, "out2"))
    assert failed.returncode == 1
    assert failed.stderr.startswith("megarlx prepare: ")
    assert "a.jsonl, line 2: not JSON" in failed.stderr


def test_text_the_tokenizer_has_no_ids_for_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "w.words").write_text("known\n")
    (tmp_path / "a.txt").write_text("known\nknown unknown\n")
    settings = settings_for(tmp_path, "out", tokenizer=str(tmp_path / "w.words"))
    with pytest.raises(TokenizerError, match=r"a\.txt: .*'unknown' is not among its 1 words"):
        prepare(settings, show=False)


def test_inputs_without_any_document_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="no document in"):
        prepare(settings_for(tmp_path, "out"), show=False)


def test_progress_counts_the_pieces_of_all_ranks_and_its_rates_are_of_this_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(number: int) -> None:
        marker = {"documents": 2, "tokens": 500, "bad_lines": 1}
        marker_path(tmp_path, number).write_text(json.dumps(marker))

    now = [100.0]
    monkeypatch.setattr("megarlx.data.prepare_progress.time.monotonic", lambda: now[0])
    pieces = [Piece(f"{n}.jsonl", "jsonl", 0, n * 10**6, n * 10**6) for n in (1, 2)]
    finish(0)  # by a run before
    with Progress(pieces, tmp_path, show=False) as progress:
        assert (progress.documents, progress.bytes) == (2, 10**6)
        finish(1)
        now[0] += 4.0
        progress.update()
        assert (progress.documents, progress.bytes) == (4, 3 * 10**6)
        assert progress.rates() == "1,000 tokens, 125 tokens/s, 0.5 MB/s, 2 bad lines"
