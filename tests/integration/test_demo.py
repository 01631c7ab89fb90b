"""The main job on real input, small: plain SFT loses safety, adaptive regularisation keeps it."""

import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("figures")
    command = [sys.executable, "-m", "safelab.cli", "demo", "--quick", "--json", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout), out


def test_stdout_is_the_file(demo):
    result, out = demo
    assert json.loads((out / "demo.json").read_text())["arms"] == result["arms"]
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_every_rate_carries_its_interval(demo):
    result, _ = demo
    assert [a["arm"] for a in result["arms"]] == ["initial", "sft", "constant-kl", "adaptive-probe"]
    for arm in result["arms"]:
        for key in ("asr", "asr_strongreject", "over_refusal", "utility"):
            r = arm[key]
            assert 0 <= r["lo"] <= r["mean"] <= r["hi"] <= 1 and r["n"] > 0
        assert arm["peak_memory_mb"] > 100
        assert (arm["step_seconds"] is None) == (arm["arm"] == "initial")
    assert result["seeds"] == [0] and result["versions"]["trl"]


def test_sft_breaks_the_model_and_adaptive_does_not(demo):
    arms = {a["arm"]: a for a in demo[0]["arms"]}
    assert arms["sft"]["asr"]["mean"] > arms["initial"]["asr"]["mean"] + 0.4
    assert arms["adaptive-probe"]["asr"]["mean"] < arms["sft"]["asr"]["mean"] - 0.4


def test_second_run_reads_what_is_cached(demo, tmp_path):
    command = [sys.executable, "-m", "safelab.cli", "demo", "--quick", "--json", "--out", str(tmp_path)]
    again = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout)
    assert again["cached_rows"] == 4 and again["arms"] == demo[0]["arms"]
