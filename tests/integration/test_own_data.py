"""The README's section "Your own data", command by command, on a directory that nobody prepared."""

from __future__ import annotations

import json
import lzma
import os
import re
import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import launching
import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from dalr_scale.cli import main
from dalr_scale.models.encoder import SentenceEncoder
from dalr_scale.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import pytest

README = Path(__file__).parents[2] / "README.md"
# what a directory of 12 images cannot have: a batch of 1024, four epochs, a real task
SMALL = ["--batch.global_size=16", "--batch.micro_size=2", "--optim.steps=3"]
WORDS = ("a", "dog", "cat", "bird", "runs", "sleeps", "sits", "on", "the", "red", "sofa", "tree")


def readme_blocks() -> dict[str, str]:
    """The code blocks of the section: two of commands, one of TOML."""
    section = README.read_text(encoding="utf-8").split("## Your own data")[1].split("\n## ")[0]
    blocks = re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)
    kinds = [kind for kind, _ in blocks]
    assert kinds == ["bash", "toml", "bash"]
    return {"before": blocks[0][1], "toml": blocks[1][1], "after": blocks[2][1]}


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.strip()]


def write_raw_data(directory: Path) -> None:
    rng = np.random.default_rng(0)
    (directory / "photos").mkdir()
    lines = ["image,caption"]
    for number in range(12):
        pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / "photos" / f"{number}.jpg")
        lines += [f"{number}.jpg,{' '.join(rng.choice(WORDS, 5))}" for _ in range(2)]
    (directory / "captions.csv").write_text("\n".join(lines) + "\n")
    sentences = [" ".join(rng.choice(WORDS, 6)) for _ in range(40)]
    (directory / "sentences.txt.xz").write_bytes(lzma.compress("\n".join(sentences).encode()))
    tasks = directory / "DATA" / "senteval" / "STS" / "STSBenchmark"
    tasks.mkdir(parents=True)
    rows = [f"g\tf\ty\t{n}\t{n % 5}.0\t{sentences[n]}\t{sentences[n + 1]}" for n in range(20)]
    (tasks / "sts-dev.csv").write_text("\n".join(rows) + "\n")
    (tasks / "sts-test.csv").write_text("\n".join(rows) + "\n")


def write_models(directory: Path) -> None:
    """A tiny BERT and a tiny open_clip model in place of the ones the README names."""
    torch.manual_seed(0)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (directory / "vocab.txt").write_text("\n".join([*special, *WORDS]) + "\n")
    tokenizer = load_tokenizer(directory / "vocab.txt")
    bert = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1}
    bert |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 40}
    encoder = SentenceEncoder.from_config(bert, tokenizer, "cls_before_pooler")
    encoder.save(directory / "PATH/TO/HF_DIRECTORY")
    # as the Hub has it: nothing says how it pools
    encoder.backbone.save_pretrained(directory / "PATH/TO/bert-base-uncased")
    tokenizer.save_pretrained(directory / "PATH/TO/bert-base-uncased")
    clip = directory / "PATH/TO/OPEN_CLIP_DIRECTORY"
    tokenizer.save_pretrained(clip)
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    text = {
        "context_length": 12,
        "vocab_size": len(tokenizer),
        "width": 16,
        "heads": 2,
        "layers": 1,
    }
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    model = open_clip.model.CLIP(**config)
    save_file(model.state_dict(), clip / "model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3}
    written = {"model_cfg": config, "preprocess_cfg": preprocess}
    (clip / "open_clip_config.json").write_text(json.dumps(written))


def train(words: list[str], directory: Path) -> str:
    """Runs the README's launch line with one process of this interpreter."""
    arguments = words[words.index("dalr_scale.train") + 1 :]
    done = launching.train(
        [*arguments, *SMALL],
        directory / "train.log",
        environment={"DALR_DATA": str(directory / "DATA")},
        setup=partial(os.chdir, directory),
    )
    assert done.codes == (0,), done.output
    return done.output


def check_several_processes(directory: Path) -> None:
    """``features`` by two processes of the launcher, one shard each: the same bytes."""
    again = shutil.copytree(directory / "shards", directory / "again")
    teacher = ["--text-teacher", "PATH/TO/HF_DIRECTORY", "--pooler", "cls_before_pooler", "--quiet"]
    assert main(["features", "shards/text", "--name", "simcse", *teacher]) == 0
    for path in again.rglob("*.simcse*.features.tar"):
        path.unlink()
    words = (
        "-m",
        "dalr_scale",
        "features",
        "again/mine",
        "again/text",
        "--name",
        "simcse",
        *teacher,
    )
    found = launching.accelerate("--use_deepspeed", "--num_processes=2", *words)
    assert found.returncode == 0, found.stdout[-4000:]
    assert found.stdout.count("1 feature shards written, set 'simcse'") == 2
    written = sorted(again.rglob("*.simcse.features.tar"))
    assert len(written) == 2
    for path in written:
        one = directory / "shards" / path.relative_to(again)
        assert path.read_bytes() == one.read_bytes(), path.name


def test_the_readme_section_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_raw_data(tmp_path)
    write_models(tmp_path)
    blocks = readme_blocks()
    for words in commands(blocks["before"]):
        assert words[0] == "dalr-scale" and main(words[1:]) == 0, capsys.readouterr().err
    check_several_processes(tmp_path)
    (tmp_path / "mine.toml").write_text(blocks["toml"])
    plan, launch, evaluate, export = commands(blocks["after"])
    assert main([*plan[1:], *SMALL, "--data.root=DATA"]) == 0, capsys.readouterr().err
    assert "STS-B-dev" in train(launch, tmp_path)
    tasks = evaluate.index("--tasks")
    evaluate[tasks + 1 : tasks + 4] = ["STS-B"]  # the two others would need their files here too
    assert main(evaluate[1:]) == 0
    assert set(json.loads((tmp_path / "scores.json").read_text())) == {"STS-B"}
    assert main(export[1:]) == 0
    assert (tmp_path / "encoder" / "model.safetensors").exists()
