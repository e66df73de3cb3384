"""The fuzzer draws the same programs for a seed, finds a planted fault, shrinks it and writes it as a script."""

import json
import random
import subprocess
import sys

from benchmarks.correctness.fuzzing.program import Program, draw_program, simpler_programs
from benchmarks.correctness.fuzzing.script import write_script
from tests.launcher import ROOT

PLANTED = """
from allinone_ds.balance.combiners.exact import StreamingCombiner
from benchmarks.correctness import fuzz

clear = StreamingCombiner.clear

def forget_to_clear(self):
    flats, self.flats = self.flats, []
    clear(self)
    self.flats = flats

StreamingCombiner.clear = forget_to_clear
fuzz.main()
"""


def _programs(count: int = 200) -> list[Program]:
    return [draw_program(random.Random(seed)) for seed in range(count)]


def test_a_seed_draws_the_same_programs_and_json_keeps_them():
    programs = _programs()
    assert programs == _programs()
    assert [Program(**json.loads(json.dumps(program.to_dict()))) for program in programs] == programs


def test_programs_reach_what_the_balancer_claims():
    programs = _programs()
    assert {program.world for program in programs} == {1, 2, 3}
    assert {program.engine["stage"] for program in programs} == {0, 1, 2, 3}
    assert {program.case.dtype for program in programs} == {"fp32", "bf16", "fp16"}
    assert {program.options["norm"] for program in programs} == {"exact", "sketch", "delayed"}
    assert {program.options["parallel"] for program in programs} == {"data", "tasks"}
    events = {step["event"]["kind"] for program in programs for step in program.steps if step["event"]}
    assert events == {"raise", "raise on one rank", "raise in step", "abandon", "reload", "nan", "evaluate"}


def test_simpler_programs_end():
    """Taking the first simpler program again and again reaches one that has none."""
    for program in _programs(20):
        for _ in range(200):
            smaller = next(simpler_programs(program), None)
            if smaller is None:
                break
            assert smaller != program
            program = smaller
        assert smaller is None and len(program.steps) == len(program.tasks) == 1


def test_scripts_are_python():
    for program in _programs(50):
        compile(write_script(program, "AssertionError: step 0"), "script", "exec")


def test_a_planted_fault_is_found_and_shrunk(tmp_path):
    steps = [{"tasks": [["det", 2], ["seg", 1]], "batch": 2, "event": None} for _ in range(3)]
    model = {"tasks": {"det": 1.0, "seg": 9.0}, "width": 3, "depth": 1, "traits": []}
    options = {"norm": "exact", "parallel": "data", "cosines_every": 0, "task_traces": True, "nonfinite": "skip_task"}
    engine = {"stage": 1, "zero": {}, "one_group": False}
    program = Program(1, engine, "sgd", model, {"name": "sum"}, options, steps=steps)
    (tmp_path / "program.json").write_text(json.dumps(program.to_dict()))
    command = [sys.executable, "-W", "ignore", "-c", PLANTED, "--program", tmp_path / "program.json"]
    command += ["--shrink", "6", "--output", tmp_path, "--json", tmp_path / "record.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    failure = json.loads((tmp_path / "record.json").read_text())["failures"][0]
    assert len(failure["program"]["steps"]) == 2, "the first step is right"
    assert "AssertionError: step 1: weight 'backbone" in failure["problem"]
    assert "show(balancer.step(require_all=False))" in (tmp_path / "1-1.py").read_text()
