"""The command line: answers on stdout, the rest on stderr, and one sentence with status 2 for whatever is wrong."""

import io
import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from twofold.cli import run
from twofold.conformance.strategies.small_checkpoint import small_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(small_checkpoint(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="module")
def raw_model(tmp_path_factory):
    """One without a chat template."""
    return str(small_checkpoint(tmp_path_factory.mktemp("raw"), chat_template=None))


def test_one_prompt_streams_to_stdout_and_the_figures_go_to_stderr(model, capsys):
    """What is piped is the answer and nothing else."""
    assert run(["generate", "hello", "-m", model, "--max-tokens", "8"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert "tokens/s" not in out
    for figure in ("prompt + ", "generated tokens", "first token", "tokens/s", "KV blocks", "slots"):
        assert figure in err


def test_json_is_one_object_a_prompt(model, capsys):
    """In the order of the prompts, with tokens, reason and times."""
    assert (
        run(
            [
                "generate",
                "hello",
                "world",
                "-m",
                model,
                "--max-tokens",
                "4",
                "--json",
                "--n",
                "2",
                "--temperature",
                "1",
                "--seed",
                "3",
            ]
        )
        == 0
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2
    assert "hello" in rows[0]["prompt"]
    assert [sample["index"] for sample in rows[0]["outputs"]] == [0, 1]
    assert rows[0]["metrics"]["time_to_first_token"] > 0
    assert rows[0]["seed"] == 3


def test_prompts_come_from_a_file_and_from_stdin(model, tmp_path, capsys, monkeypatch):
    """--file has one a line, blank lines aside; - is all of stdin."""
    file = tmp_path / "prompts.txt"
    file.write_text("hello\n\nworld\n")
    assert run(["generate", "-m", model, "--file", str(file), "--max-tokens", "2", "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    monkeypatch.setattr("sys.stdin", io.StringIO(file.read_text()))
    assert run(["generate", "-", "-m", model, "--max-tokens", "2", "--json", "--raw"]) == 0
    (row,) = capsys.readouterr().out.splitlines()
    assert json.loads(row)["prompt"] == "hello\n\nworld\n"


def test_a_trace_is_written_and_drawn(model, tmp_path, capsys):
    """The trace has a record for every step, and its picture is well-formed and shows each request."""
    file = tmp_path / "run.jsonl"
    assert run(["generate", "hello", "world", "12", "-m", model, "--max-tokens", "5", "--trace", str(file)]) == 0
    kinds = [json.loads(line)["kind"] for line in file.read_text().splitlines()]
    assert kinds[0] == "start"
    assert kinds.count("add") == kinds.count("end") == 3
    assert kinds.count("step") >= 5
    assert run(["trace", str(file)]) == 0
    root = ElementTree.parse(tmp_path / "run.svg").getroot()
    boxes = root.findall("{*}rect")
    assert len([box for box in boxes if box.get("class") in ("prefill", "decode")]) >= 15
    assert capsys.readouterr().out.strip().endswith("run.svg")


def test_a_profile_names_what_the_backend_ran(model, tmp_path):
    """`torch.profiler`'s trace of the answers."""
    file = tmp_path / "run.json"
    asked = ["generate", "hello", "-m", model, "--backend", "plain_torch", "--max-tokens", "3", "--profile", str(file)]
    assert run(asked) == 0
    names = {event.get("name", "") for event in json.loads(file.read_text())["traceEvents"]}
    assert {"aten::mm", "aten::matmul", "aten::linear"} & names


def test_models_lists_formats_and_what_a_token_costs(model, capsys):
    """Every KV format with its bytes, every weight format, for the model asked for."""
    assert run(["models", "-m", model, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    costs = row["kv_bytes_per_token"]
    assert costs["float32"] == 2 * 2 * 2 * 8 * 4, "2 layers, keys and values, 2 KV heads of 8 numbers of 4 bytes"
    assert costs["kivi2"] < costs["int4"] < costs["int8"] < costs["bfloat16"] < costs["float32"]
    assert run(["models", "-m", model]) == 0
    out = capsys.readouterr().out
    assert "kivi2" in out
    assert "sparse24" in out


def test_chat_remembers_and_resets(model, capsys, monkeypatch):
    """Lines in, answers out; /reset forgets; the end of input ends it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nworld\n/reset\nhello\n"))
    assert run(["chat", "-m", model, "--max-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    answers = out.splitlines()
    counts = [int(line.split(" prompt")[0]) for line in err.splitlines() if " prompt + " in line]
    assert len(counts) == 3
    assert counts[1] > counts[0] == counts[2]
    assert answers[0] == answers[-1]


BAD = {
    "no such model": (["generate", "x", "-m", "no/such/folder/here"], "no such folder or file"),
    "no prompt": (["generate"], "no prompt"),
    "empty prompt": (["generate", "", "-m", "MODEL"], "empty"),
    "prompt longer than the context": (["generate", "hello " * 2000, "-m", "MODEL"], "256"),
    "prompt longer than the pool": (["generate", "abc " * 30, "-m", "MODEL", "--num-blocks", "2"], "32"),
    "top-p": (["generate", "x", "-m", "MODEL", "--top-p", "1.5"], "top_p"),
    "temperature": (["generate", "x", "-m", "MODEL", "--temperature", "-1"], "temperature"),
    "temperature, no number": (["generate", "x", "-m", "MODEL", "--temperature", "warm"], "--temperature"),
    "max-tokens": (["generate", "x", "-m", "MODEL", "--max-tokens", "0"], "max_tokens"),
    "n": (["generate", "x", "-m", "MODEL", "--n", "0"], "n:"),
    "unknown option": (["generate", "x", "--tempratur", "1"], "--tempratur"),
    "unknown command": (["generat"], "generat"),
    "KV format": (["generate", "x", "-m", "MODEL", "--kv-cache-dtype", "int5"], "int5"),
    "weight format": (["generate", "x", "-m", "MODEL", "--weights", "int5"], "int5"),
    "lora modules": (["generate", "x", "-m", "MODEL", "--lora-modules", "style"], "NAME=PATH"),
    "no adapter there": (["generate", "x", "-m", "MODEL", "--lora-modules", "style=/none"], "adapter_config.json"),
    "speculate": (["generate", "x", "-m", "MODEL", "--speculate", "ngram:0"], "ngram"),
    "file": (["generate", "-m", "MODEL", "--file", "/no/such/file"], "/no/such/file"),
    "trace file": (["generate", "x", "-m", "MODEL", "--trace", "/no/such/folder/t.json"], "/no/such/folder"),
    "profile without torch": (["generate", "x", "-m", "MODEL", "--profile", "p.json"], "on torch"),
    "profile file": (
        ["generate", "x", "-m", "MODEL", "--backend", "plain_torch", "--profile", "/no/such/folder/p.json"],
        "/no/such/folder",
    ),
    "trace of what is none": (["trace", "/etc/hostname"], "not a trace"),
    "chat without a template": (["generate", "x", "-m", "RAW", "--chat"], "chat template"),
    "system without a template": (["generate", "x", "-m", "RAW", "--system", "y"], "chat template"),
    "backend": (["generate", "x", "-m", "MODEL", "--backend", "nosuch"], "nosuch"),
    "preemption": (["generate", "x", "-m", "MODEL", "--preemption", "never"], "preemption"),
    "swap coding": (["generate", "x", "-m", "MODEL", "--swap-coding", "lossless"], "preemption"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_one_line_and_status_2(name, model, raw_model, capsys):
    """One line on stderr that names what is wrong, status 2, no traceback."""
    arguments, sentence = BAD[name]
    arguments = [{"MODEL": model, "RAW": raw_model}.get(argument, argument) for argument in arguments]
    assert run(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("twofold: ")]
    assert len(lines) == 1, lines
    assert sentence in lines[0]
    assert "Traceback" not in lines[0]


def test_a_prompt_that_fails_takes_no_other_with_it(model, capsys):
    """The others are answered in full, and the status is 2."""
    assert run(["generate", "hello", "abc " * 3000, "world", "-m", model, "--max-tokens", "4", "--json"]) == 2
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    assert len([line for line in err.splitlines() if line.startswith("twofold: ")]) == 1


def test_ctrl_c_keeps_what_came_and_exits_with_130(tmp_path):
    """A process interrupted while it generates prints what it has, and its figures."""
    model = str(small_checkpoint(tmp_path, context=16384))
    process = subprocess.Popen(
        [sys.executable, "-m", "twofold", "generate", "hello", "-m", model, "--max-tokens", "10000", "--raw"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    assert first + out
    assert b"Traceback" not in err
    assert b"generated tokens" in err


def test_help_is_not_an_error(capsys):
    """Asking for help is status 0."""
    assert run(["--help"]) == 0
    assert "generate" in capsys.readouterr().out
    assert run(["generate", "--help"]) == 0
