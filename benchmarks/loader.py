"""Batches out of a token file: megarlx's loader against Megatron's readers, on the same file.

python benchmarks/loader.py [--megatokens 50] [--json PATH] [--markdown PATH]

No prefetch thread and no worker processes on either side: what is measured is the work itself. The
file stays in the page cache; each call of a function reads samples that were not read before.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from timing import Row, add_outputs, interleaved_seconds, machine, row, shown, write_results

from megarlx.data.blend import Blend, Composition
from megarlx.data.loader import BatchLayout, Loader
from megarlx.data.native import index
from megarlx.data.samples import TokenSource
from megarlx.data.token_files import TokenFile, TokenFileWriter, bin_path

VOCABULARY = 50_304
SEQUENCES = 64  # in a batch


def write_tokens(prefix: Path, tokens: int, mean_document: int) -> None:
    rng = np.random.default_rng(0)
    with TokenFileWriter(prefix, "u2") as writer:
        while writer.tokens < tokens:
            length = int(rng.exponential(mean_document)) + 1
            writer.add(rng.integers(0, VOCABULARY, length, dtype=np.uint16))


def ours(prefix: Path, sequence_length: int, with_documents: bool) -> Callable[[], object]:
    source = TokenSource("a", TokenFile(prefix, VOCABULARY), sequence_length, seed=0)
    loader = Loader(
        Blend([source], [Composition(0, {"a": 1.0})], 0),
        BatchLayout(SEQUENCES, SEQUENCES),
        with_documents=with_documents,
        prefetch_steps=0,
    )
    return loader.next_step


def megatron_dataset(prefix: Path, sequence_length: int, cache: Path) -> Callable[[], object]:
    """GPTDataset through a torch DataLoader, as Megatron's training uses it."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=sequence_length,
        blend=([str(prefix)], None),
        split="100,0,0",
        path_to_cache=str(cache),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=SimpleNamespace(
            vocab_size=VOCABULARY, eod=0, pad=-1, unique_identifiers={"class": "none"}
        ),
        mid_level_dataset_surplus=0.005,
    )
    indexed = IndexedDataset(str(prefix), mmap=True)
    documents = np.arange(indexed.document_indices.shape[0] - 1, dtype=np.int32)
    samples = int(indexed.sequence_lengths.sum()) // sequence_length - 1
    dataset = GPTDataset(indexed, str(prefix), documents, samples, Split.train, config)

    def batches() -> Iterator[object]:
        while True:
            yield from torch.utils.data.DataLoader(dataset, batch_size=SEQUENCES)

    found = batches()
    return lambda: next(found)


def megatron_reader(prefix: Path, sequence_length: int) -> Callable[[], object]:
    """IndexedDataset.get alone: pieces, joined and made into inputs and targets."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    indexed = IndexedDataset(str(prefix), mmap=True)
    lengths = np.array(indexed.sequence_lengths)
    positions, offsets = index.sample_index(lengths, sequence_length, epochs=1, seed=0)
    documents = index.documents_at(np.arange(len(lengths)), len(lengths), seed=0)
    order = itertools.cycle(index.permute(np.arange(len(offsets) - 1), len(offsets) - 1, seed=1))

    def sample(number: int) -> torch.Tensor:
        first, last = positions[number], positions[number + 1]
        parts = []
        for at in range(first, last + 1):
            begin = int(offsets[number]) if at == first else 0
            end = int(offsets[number + 1]) + 1 if at == last else int(lengths[documents[at]])
            parts.append(indexed.get(int(documents[at]), offset=begin, length=end - begin))
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.stack([sample(next(order)) for _ in range(SEQUENCES)])
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return batch


def rows(folder: Path, megatokens: int) -> Iterator[Row]:
    for mean_document, sequence_length in ((600, 1024), (600, 4096), (120, 2048)):
        prefix = folder / f"tokens_{mean_document}"
        if not bin_path(prefix).exists():
            write_tokens(prefix, megatokens * 1_000_000, mean_document)
        mine = ours(prefix, sequence_length, with_documents=False)
        marked = ours(prefix, sequence_length, with_documents=True)
        functions = {
            "ours": mine,
            "ours with documents": marked,
            "dataset": megatron_dataset(prefix, sequence_length, folder / "cache"),
            "reader": megatron_reader(prefix, sequence_length),
        }
        seconds = interleaved_seconds(functions, pairs=31)
        rate = {name: SEQUENCES * sequence_length / s / 1e6 for name, s in seconds.items()}
        size = f"{sequence_length} tokens, documents of {mean_document}"
        peer = "megatron-core GPTDataset + DataLoader"
        yield row("loader", size, rate["ours"], rate["dataset"], peer, "Mtokens/s")
        reader = "megatron-core IndexedDataset.get"
        yield row("loader", size, rate["ours"], rate["reader"], reader, "Mtokens/s")
        name = "loader with cu_seqlens"
        yield row(name, size, rate["ours with documents"], rate["reader"], reader, "Mtokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megatokens", type=int, default=50)
    add_outputs(parser)
    options = parser.parse_args()
    facts, found = machine(), []
    with tempfile.TemporaryDirectory() as folder:
        for line in rows(Path(folder), options.megatokens):
            found.append(shown(line))
    write_results(options, "Loader on a CPU", facts, found)


if __name__ == "__main__":
    main()
