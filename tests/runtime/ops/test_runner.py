"""pocketslm-run: the JSON-lines protocol, the tokenizer, and the static aarch64 build."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from native_runner import Runner, running
from native_support import every_kind, every_kind_config, write_tiny
from tokenizers import Tokenizer

import support
from pocketslm.runtime.backends.native import NativeModel
from pocketslm.runtime.backends.native_library import isa_names

SEED = 5
PROTOCOL_LINES = 100_000
PROMPT = [5, 200, 31, 77, 140, 9, 9, 250, 3, 18, 64]

# What the aarch64 build may ask of a kernel: an app's seccomp filter knows all of these.
SYSTEM_CALLS = {
    *("brk", "clone", "close", "exit", "exit_group", "fcntl", "fstat", "futex", "getpid"),
    *("getrandom", "gettid", "ioctl", "lseek", "madvise", "mmap", "mprotect", "mremap"),
    *("munmap", "newfstatat", "openat", "prlimit64", "read", "readlinkat", "readv", "rseq"),
    *("rt_sigaction", "rt_sigprocmask", "sched_getaffinity", "sched_setaffinity"),
    *("sched_yield", "set_robust_list", "set_tid_address", "uname", "write", "writev"),
    *("clock_gettime", "fstatat64"),
}


@pytest.fixture(scope="module")
def runner(runner_path: Path, chat_model: Path) -> Iterator[Runner]:
    with running([str(runner_path)]) as started:
        loaded = started.ask(op="load", path=str(chat_model), threads=2, context=300)
        assert loaded["event"] == "loaded"
        assert loaded["isa"] == isa_names()[0]
        assert loaded["tokenizer"]
        yield started


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(support.tokenizer_files()["tokenizer.json"])


def test_tokenizer_matches_the_reference(runner: Runner, tokenizer: Tokenizer) -> None:
    rng = random.Random(SEED)
    alphabet = [
        *"  \n\t'abtheinrX9.,!",
        "é",
        "ß",
        "你",
        "🙂",
        "٣",
        "½",
        "\u00a0",
        "\u2003",
        "\u200b",
    ]
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(500)]
    texts += [
        "the  inner   \n\n there's we'LL 'd",
        "a<|im_start|>b<|im_end|>",
        " ",
        "\n ",
        "x" * 5000,
    ]
    for text in texts:
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert runner.ask(op="encode", prompt=text)["tokens"] == expected, repr(text)


def test_greedy_generation_matches_the_python_session(runner: Runner, chat_model: Path) -> None:
    tokens, _, done = runner.generate(tokens=PROMPT, max_tokens=30, ignore_eos=True)
    session = NativeModel(chat_model).session(threads=1)
    token = int(session.forward(np.array(PROMPT))[0].argmax())
    expected = [token]
    for _ in range(29):
        expected.append(session.step_greedy(expected[-1]))
    assert tokens == expected
    assert done["reason"] == "length"
    assert (done["prompt_tokens"], done["tokens"]) == (len(PROMPT), 30)


def test_text_arrives_in_whole_characters(runner: Runner, tokenizer: Tokenizer) -> None:
    for seed in range(5):
        tokens, text, _ = runner.generate(
            prompt="the inner", max_tokens=40, temperature=5.0, seed=seed, ignore_eos=True
        )
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_sampling_follows_seed_and_limits(runner: Runner) -> None:
    def sample(**options: float) -> list[int]:
        return runner.generate(tokens=PROMPT, max_tokens=20, ignore_eos=True, **options)[0]

    greedy = sample()
    assert sample(temperature=2.0, seed=1) == sample(temperature=2.0, seed=1)
    assert sample(temperature=2.0, seed=1) != sample(temperature=2.0, seed=2)
    assert sample(temperature=2.0, top_k=1, seed=3) == greedy
    assert sample(temperature=2.0, top_p=0.0, seed=3) == greedy


def test_chat_reuses_the_prefix_and_guards_special_tokens(
    runner: Runner, tokenizer: Tokenizer
) -> None:
    user = {"role": "user", "content": "the <|im_end|> inner"}
    tokens = runner.ask(op="encode", messages=[user])["tokens"]
    assert tokenizer.decode(tokens, skip_special_tokens=False) == (
        "<|im_start|>user\nthe <|im_end|> inner<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokens.count(257) == 1  # the one that the template wrote
    _, answer, first = runner.generate(messages=[user], max_tokens=4, ignore_eos=True)
    again = [user, {"role": "assistant", "content": answer}, {"role": "user", "content": "er"}]
    _, _, done = runner.generate(messages=again, max_tokens=2)
    assert first["prompt_tokens"] <= done["reused_tokens"] < done["prompt_tokens"]
    for bad in ([], [{"role": "assistant", "content": "x"}], [user, user], [{"role": "user"}]):
        assert runner.ask(op="generate", messages=bad)["event"] == "error"


def test_cancel_ends_a_generation(runner: Runner) -> None:
    # With a pipe of one page the runner waits for its reader long before it is done, however fast
    # the tiny model is, and has time to see the cancel.
    assert runner.process.stdout is not None
    fcntl.fcntl(runner.process.stdout, fcntl.F_SETPIPE_SZ, 4096)
    runner.send(op="generate", id="long", tokens=PROMPT, max_tokens=280, ignore_eos=True)
    runner.send(op="cancel", id="other")
    runner.send(op="cancel", id="long")
    time.sleep(0.5)
    events = [runner.event()]
    while events[-1]["event"] == "token":
        events.append(runner.event())
    assert events[-1]["event"] == "done"
    assert events[-1]["reason"] == "cancelled"
    assert len(events) < 280


def test_context_end_and_overflow(runner: Runner) -> None:
    _, _, done = runner.generate(tokens=PROMPT, max_tokens=1000, ignore_eos=True)
    assert done["reason"] == "context"
    assert done["tokens"] == 300 - len(PROMPT) + 1
    error = runner.ask(op="generate", tokens=[1] * 301)
    assert "do not fit the context of 300" in error["message"]


def test_bench_and_stats(runner: Runner) -> None:
    bench = runner.ask(op="bench", prompt_tokens=20, new_tokens=5, repeats=3)
    assert len(bench["prefill_ns"]) == len(bench["decode_ns"]) == 3
    assert all(ns > 0 for ns in bench["prefill_ns"] + bench["step_ns"])
    steps = np.array(bench["step_ns"]).reshape(3, 5)
    assert steps.sum(1).tolist() == bench["decode_ns"]
    given = runner.ask(op="bench", tokens=PROMPT, new_tokens=0, repeats=2)
    assert (given["prompt_tokens"], len(given["prefill_ns"])) == (len(PROMPT), 2)
    assert given["decode_ns"] == given["step_ns"] == []
    stats = runner.ask(op="stats")
    assert 0 < stats["rss_bytes"] <= stats["peak_rss_bytes"]
    assert stats["rss_anon_bytes"] + stats["rss_file_bytes"] == stats["rss_bytes"]
    assert 0 < stats["pss_file_bytes"] < stats["pss_bytes"] <= stats["peak_rss_bytes"]
    assert stats["cpu_ns"] >= sum(bench["prefill_cpu_ns"] + bench["decode_cpu_ns"]) > 0
    probe = runner.ask(op="probe", threads=1, bytes=1 << 20)
    assert probe["bandwidth_bytes_per_s"] > 1e8
    assert probe["int8_macs_per_s"] > 1e7
    assert "times" not in stats


def test_stats_of_a_profiled_model_say_where_time_went(runner_path: Path, chat_model: Path) -> None:
    with running([str(runner_path)]) as runner:
        runner.ask(op="load", path=str(chat_model), threads=2, profile=True)
        done = runner.generate(tokens=PROMPT, max_tokens=4)[2]
        times = runner.ask(op="stats")["times"]
        assert times["calls"] == 4
        assert times["tokens"] == len(PROMPT) + 3
        spent = [value for name, value in times.items() if name.endswith("_ns")]
        assert 0 < sum(spent) <= 1e6 * (done["prefill_ms"] + done["decode_ms"])
        runner.ask(op="reset")
        assert not any(runner.ask(op="stats")["times"].values())


def test_a_long_bench_can_be_cancelled(runner: Runner) -> None:
    runner.send(op="bench", id="long", tokens=PROMPT, new_tokens=200, repeats=1000)
    runner.send(op="cancel", id="long")
    assert runner.event()["message"] == "cancelled"


def test_a_bench_that_nobody_reads_ends(runner_path: Path, chat_model: Path) -> None:
    with running([str(runner_path)]) as runner:
        runner.ask(op="load", path=str(chat_model), threads=1)
        runner.send(op="bench", new_tokens=200, prompt_tokens=200, repeats=1000)
        assert runner.process.stdout is not None
        runner.process.stdout.close()
        runner.process.wait(60)


def test_a_cold_load_reads_storage(runner_path: Path, chat_model: Path, tmp_path: Path) -> None:
    # A file that nobody else maps: mapped pages stay in the page cache.
    model = Path(shutil.copy(chat_model, tmp_path))
    kind = subprocess.run(
        ["stat", "-f", "-c", "%T", model], capture_output=True, text=True, check=True
    ).stdout.strip()
    if kind == "tmpfs":
        pytest.skip("the model lies in memory")
    read = {}
    for cold in (False, True):
        with running([str(runner_path)]) as runner:
            runner.ask(op="stats")
            counters = Path(f"/proc/{runner.process.pid}/io")
            before = re.search(r"^read_bytes: (\d+)", counters.read_text(), re.MULTILINE)
            runner.ask(op="load", path=str(model), threads=1, cold=cold)
            after = re.search(r"^read_bytes: (\d+)", counters.read_text(), re.MULTILINE)
            assert before
            assert after
            read[cold] = int(after[1]) - int(before[1])
    assert read[False] == 0
    assert read[True] >= model.stat().st_size / 2


def test_threads_stay_on_the_cpus_asked_for(runner_path: Path, chat_model: Path) -> None:
    allowed = os.sched_getaffinity(0)
    some = min(allowed)
    with running([str(runner_path)]) as runner:

        def masks(**options: object) -> list[set[int]]:
            runner.ask(op="load", path=str(chat_model), threads=2, **options)
            tasks = Path(f"/proc/{runner.process.pid}/task").iterdir()
            return [os.sched_getaffinity(int(task.name)) for task in tasks]

        assert masks(cpus=[some]).count({some}) >= 2  # the third one waits for input
        assert all(mask == allowed for mask in masks())
        reply = runner.ask(op="load", path=str(chat_model), cpus=[max(allowed) + 1])
        assert f"CPU {max(allowed) + 1} is not among" in reply["message"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"op": "fly"}, "unknown op"),
        ({"op": "generate", "tokens": [264]}, "ids below 264"),
        ({"op": "generate", "tokens": []}, "must not be empty"),
        ({"op": "generate", "tokens": [1.5]}, "ids below 264"),
        ({"op": "generate", "tokens": None}, "'tokens' must be a list"),
        ({"op": "generate", "tokens": [1], "eos": [2**31]}, "'eos' must be"),
        ({"op": "generate", "tokens": [1], "eos": [-1]}, "'eos' must be"),
        ({"op": "generate", "tokens": [1], "eos": ["a"]}, "'eos' must be"),
        ({"op": "generate", "prompt": ""}, "the prompt is empty"),
        ({"op": "logits", "prompt": ""}, "the prompt is empty"),
        ({"op": "logits", "tokens": []}, "must not be empty"),
        ({"op": "generate", "tokens": [1], "max_token": 3}, "'max_token' is unknown here"),
        ({"op": "generate", "tokens": [1], "prompt": "a"}, "'prompt' is unknown here, or says"),
        ({"op": "generate", "prompt": 5}, "'prompt' must be a string"),
        ({"op": "bench", "tokens": [1], "prompt_tokens": 2}, "'prompt_tokens' is unknown here"),
        ({"op": "logits", "tokens": [1], "frist": 0}, "'frist' is unknown here"),
        ({"op": "encode", "text": "a"}, "'text' is unknown here"),
        ({"op": "load", "path": "x", "thread": 2}, "'thread' is unknown here"),
        ({"op": "stats", "x": 1}, "'x' is unknown here"),
        ({"op": "stats", "id": 5}, "'id' must be a string"),
        ({"op": "probe", "thread": 1}, "'thread' is unknown here"),
        ({"op": "reset", "x": 1}, "'x' is unknown here"),
        ({"op": "generate", "tokens": [1], "temperature": -1}, "'temperature' must be"),
        ({"op": "generate", "tokens": [1], "temperature": 1e-30}, "temperature is 0, or 1e-6"),
        ({"op": "generate", "tokens": [1], "max_tokens": 1.5}, "'max_tokens' must be"),
        ({"op": "generate", "tokens": [1], "top_p": "x"}, "'top_p' must be"),
        ({"op": "bench", "prompt_tokens": 500}, "do not fit"),
        ({"op": "bench", "tokens": [999]}, "ids below 264"),
        ({"op": "load", "path": "x", "cpus": ["a"]}, "'cpus' must be"),
        ({"op": "probe", "threads": 0}, "'threads' must be"),
        ([], "one line with a JSON object"),
    ],
)
def test_faulty_requests_are_errors(runner: Runner, request_: object, message: str) -> None:
    assert runner.process.stdin is not None
    runner.process.stdin.write(json.dumps(request_) + "\n")
    runner.process.stdin.flush()
    event = runner.event()
    assert event["event"] == "error"
    assert message in event["message"]


@pytest.mark.parametrize(
    "line",
    [
        '{"op":"stats","op":"quit"}',
        '{"op":"stats","x":{"a":1,"b":2,"a":3}}',
        '{"op":"stats","x":[' + "1," * 2**18 + "1]}",
        '{"op":"stats","x":"' + "a" * 2**24 + '"}',
    ],
    ids=["double field", "double field inside", "too many values", "too long"],
)
def test_lines_that_are_no_request(runner: Runner, line: str) -> None:
    assert runner.process.stdin is not None
    runner.process.stdin.write(line + "\n")
    runner.process.stdin.flush()
    event = runner.event()
    assert (event["event"], event["id"]) == ("error", "")
    assert "one line with a JSON object" in event["message"]
    assert runner.ask(op="stats", id="next")["id"] == "next"


def test_a_logits_request_after_one_with_a_cache(runner: Runner) -> None:
    """Of an empty prompt nothing is read, whatever the session holds."""
    assert len(runner.ask(op="logits", tokens=[1, 2])["logits"]) == 264
    assert "the prompt is empty" in runner.ask(op="logits", prompt="")["message"]
    assert len(runner.ask(op="logits", tokens=[1, 2])["logits"]) == 264


def test_every_event_has_the_id_of_its_request(runner: Runner, chat_model: Path) -> None:
    for at, request in enumerate(
        (
            {"op": "stats"},
            {"op": "encode", "prompt": "the"},
            {"op": "logits", "tokens": [1]},
            {"op": "bench", "prompt_tokens": 2, "new_tokens": 1, "repeats": 1},
            {"op": "probe", "bytes": 1 << 20},
            {"op": "reset"},
            {"op": "fly"},
        )
    ):
        assert runner.ask(**request, id=str(at))["id"] == str(at)
    runner.send(op="generate", tokens=PROMPT, max_tokens=2, id="g", ignore_eos=True)
    assert [runner.event()["id"] for _ in range(3)] == ["g"] * 3


def test_the_token_that_ends_an_answer_is_told(runner: Runner) -> None:
    tokens, _, _ = runner.generate(tokens=PROMPT, max_tokens=8, ignore_eos=True)
    made, _, done = runner.generate(tokens=PROMPT, max_tokens=8, eos=[tokens[3]])
    assert made == tokens[: tokens.index(tokens[3])]
    assert (done["reason"], done["token"]) == ("eos", tokens[3])
    assert "logprob" not in done
    _, _, done = runner.generate(tokens=PROMPT, max_tokens=8, eos=[tokens[3]], logprobs=True)
    assert done["logprob"] < 0


def test_a_lack_of_memory_is_an_answer(runner_path: Path, chat_model: Path) -> None:
    room = 60 << 20

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (room, room))

    text = "x" * (12 << 20)
    lines = [
        {"op": "load", "path": str(chat_model), "threads": 1, "context": 64},
        {"op": "encode", "prompt": text},
        {"op": "encode", "id": "after", "prompt": "the"},
    ]
    done = subprocess.run(
        [runner_path, "--json"],
        input="".join(json.dumps(line) + "\n" for line in lines),
        capture_output=True,
        text=True,
        preexec_fn=limit,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    loaded, refused, after = map(json.loads, done.stdout.splitlines())
    assert loaded["event"] == "loaded"
    assert (refused["event"], refused["message"]) == ("error", "out of memory")
    assert (after["event"], after["id"]) == ("encoded", "after")


def test_an_answer_that_cannot_be_written_ends_it(runner_path: Path, chat_model: Path) -> None:
    load = json.dumps({"op": "load", "path": str(chat_model)}) + "\n"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [runner_path, "--json"], input=load, stdout=full, stderr=subprocess.PIPE, text=True
        )
        assert done.returncode == 1
        assert "cannot be written" in done.stderr
        done = subprocess.run(
            [runner_path, chat_model, "-p", "the"], stdout=full, stderr=subprocess.PIPE, text=True
        )
        assert done.returncode == 2
        assert "cannot be written" in done.stderr


def test_a_pipe_is_no_model(runner_path: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with running([str(runner_path)]) as runner:
        for cold in (False, True):
            answer = runner.ask(op="load", path=str(tmp_path / "pipe"), cold=cold)
            assert "not a regular file" in answer["message"]


def test_failed_load_leaves_a_clean_state(runner_path: Path, chat_model: Path) -> None:
    with running([str(runner_path)]) as runner:
        assert "no model is loaded" in runner.ask(op="bench")["message"]
        assert "cannot open" in runner.ask(op="load", path="/nowhere.slm")["message"]
        assert "kernel path" in runner.ask(op="load", path=str(chat_model), isa="mmx")["message"]
        assert "'kv' must be" in runner.ask(op="load", path=str(chat_model), kv="fp8")["message"]
        assert not runner.ask(op="stats")["loaded"]
        assert runner.ask(op="load", path=str(chat_model), kv="int8")["kv"] == "int8"
        runner.send(op="quit")
        assert runner.process.wait(10) == 0


def test_mutated_lines_never_crash(runner_path: Path, chat_model: Path) -> None:
    rng = random.Random(SEED)
    seeds = [
        json.dumps({"op": "generate", "id": "a", "tokens": [1, 2], "max_tokens": 1, "seed": 3}),
        json.dumps({"op": "encode", "prompt": "the \u00e9 \U0001f642 <|im_end|>"}),
        json.dumps({"op": "encode", "messages": [{"role": "user", "content": "hi"}]}),
        json.dumps({"op": "bench", "prompt_tokens": 1, "new_tokens": 1, "repeats": 1}),
        json.dumps({"op": "stats", "x": [[[{"a": None, "b": True, "c": -1.5e3}]]]}),
    ]
    lines = [json.dumps({"op": "load", "path": str(chat_model), "threads": 1, "context": 64})]
    for _ in range(PROTOCOL_LINES):
        line = list(rng.choice(seeds))
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(line))
            line[at : at + rng.randint(0, 3)] = rng.choices('{}[]",:\\ueE-+.019ax\0\xff', k=2)
        lines.append("".join(line).replace("quit", "q"))
    lines.append(json.dumps({"op": "stats"}))
    data = "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n"
    done = subprocess.run([runner_path, "--json"], input=data, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[0]["event"] == "loaded"
    assert events[-1]["event"] == "stats"
    assert {"error", "encoded", "token"} <= {event["event"] for event in events}


def test_command_line(runner_path: Path, chat_model: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(runner_path), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )

    done = run(str(chat_model), "--chat", "the inner", "-n", "3", "-t", "2")
    assert done.returncode == 0, done.stderr
    assert "tok/s" in done.stderr
    for arguments, message in [
        ((), "no model file"),
        (("/nowhere.slm",), "cannot open"),
        ((str(chat_model), "-n", "x"), "out of range"),
        ((str(chat_model), "--frobnicate"), "unknown or needs a value"),
        ((str(chat_model), "--seed", "1.5"), "out of range"),
        # What would do nothing.
        (("--json", str(chat_model)), "--json goes alone"),
        (("--json", "-t", "2"), "--json goes alone"),
        ((str(chat_model), "-p", "a", "--chat", "b"), "two prompts"),
        ((str(chat_model), "-p", "--chat", "--system", "b"), "--system is for --chat"),
        ((str(chat_model), "--seed", "5"), "--seed does nothing without a --temperature"),
        ((str(chat_model), "--bench", "-n", "5"), "-n does nothing with --bench"),
    ]:
        done = run(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
    assert "usage" in run("--help").stdout
    assert run(str(chat_model), "--chat", "-p", "-n", "1").returncode == 0


def program_headers(path: Path) -> list[tuple[int, int]]:
    """(type, alignment) of a 64-bit little-endian ELF's program headers."""
    data = path.read_bytes()
    offset = struct.unpack_from("<Q", data, 32)[0]
    size, count = struct.unpack_from("<HH", data, 54)
    found = []
    for i in range(count):
        at = offset + i * size
        found.append(
            (struct.unpack_from("<I", data, at)[0], struct.unpack_from("<Q", data, at + 48)[0])
        )
    return found


def test_arm_build_is_static_and_aligned_for_large_pages(arm_runner_path: Path) -> None:
    headers = program_headers(arm_runner_path)
    load, interpreter = 1, 3
    assert all(kind != interpreter for kind, _ in headers)
    assert all(alignment >= 16384 for kind, alignment in headers if kind == load)


@pytest.mark.parametrize(
    ("cpu", "isa"),
    [("max", "neon_i8mm"), ("cortex-a76", "neon_dotprod"), ("cortex-a53", "scalar")],
)
def test_arm_paths_agree_with_this_machine(
    cpu: str, isa: str, arm_runner_path: Path, chat_model: Path
) -> None:
    """Every kind of weight, batches and single steps, on the paths that a CPU selects by itself."""
    session = NativeModel(chat_model).session(threads=1)
    tokens = (PROMPT * 3)[:27]  # a batch of 16, 8, 2 and 1
    expected = session.forward(np.array(tokens))[0]
    with running(["qemu-aarch64-static", "-cpu", cpu, str(arm_runner_path)]) as runner:
        loaded = runner.ask(op="load", path=str(chat_model), threads=2)
        assert loaded["isa"] == isa
        logits = np.array(runner.ask(op="logits", tokens=tokens)["logits"], np.float32)
        if isa == "scalar" or session.isa == "scalar":
            np.testing.assert_allclose(logits, expected, atol=1e-3 * np.abs(expected).max())
        else:
            np.testing.assert_array_equal(logits, expected)
        session.truncate(0)
        token = int(session.forward(np.array(PROMPT))[0].argmax())
        greedy = [token]
        for _ in range(19):
            greedy.append(session.step_greedy(greedy[-1]))
        assert runner.generate(tokens=PROMPT, max_tokens=20, ignore_eos=True)[0] == greedy


@pytest.mark.parametrize("cpu", ["max", "cortex-a76"])
def test_arm_paths_hold_every_kind_of_weight(
    cpu: str, arm_runner_path: Path, tmp_path: Path
) -> None:
    config = every_kind_config(vocab_size=264)
    write_tiny(tmp_path / "model.slm", config, every_kind)
    session = NativeModel(tmp_path / "model.slm").session(threads=1)
    expected = session.forward(np.array(PROMPT))[0]
    with running(["qemu-aarch64-static", "-cpu", cpu, str(arm_runner_path)]) as runner:
        assert runner.ask(op="load", path=str(tmp_path / "model.slm"))["event"] == "loaded"
        logits = np.array(runner.ask(op="logits", tokens=PROMPT)["logits"], np.float32)
    if session.isa == "scalar":
        np.testing.assert_allclose(logits, expected, atol=1e-3 * np.abs(expected).max())
    else:
        np.testing.assert_array_equal(logits, expected)


def test_arm_build_makes_only_old_system_calls(arm_runner_path: Path, chat_model: Path) -> None:
    command = ["qemu-aarch64-static", "-cpu", "max", "-strace", str(arm_runner_path)]
    command += [str(chat_model), "-p", "the", "-n", "3", "-t", "2", "--pin"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    lines = done.stderr.decode(errors="replace")
    calls = set(re.findall(r"^\d+ (\w+)\(", lines, re.MULTILINE))
    assert "mmap" in calls
    assert calls <= SYSTEM_CALLS
