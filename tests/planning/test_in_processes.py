"""Remedies that several processes plan are those that one plans."""

from __future__ import annotations

import pickle
import subprocess
import sys

from memtrace.planning.what_if import in_processes
from memtrace.record.breakdown import Breakdown, EntryKey, ordered_entries
from memtrace.record.categories import Category, Moment

SCRIPT = """
import os
import transformers
from memtrace.planning.recipe import find_recipe
from memtrace.planning.simulation_request import SimulationRequest, plan_simulated
from memtrace.planning.what_if import in_processes
from memtrace.planning.what_if.simulated_remedies import simulated_remedies
from memtrace.simulation.models.builds import BatchSettings

sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 99}
asked = SimulationRequest(
    configuration=transformers.GPT2Config(**sizes), recipe=find_recipe("fp32"),
    batch=BatchSettings(samples=2, positions=16),
)
plan, said = plan_simulated(asked), []
alone = simulated_remedies(asked, plan, said.append)
names, said[:] = list(said), []
together = simulated_remedies(asked, plan, said.append, processes=2)
assert alone and together == alone, (alone, together)
assert said == names

planned = in_processes._planned

def killed(at):
    return os._exit(9) if at == 1 else planned(at)

killed.__module__, killed.__qualname__ = in_processes.__name__, "_planned"
in_processes._planned = killed
assert simulated_remedies(asked, plan, processes=2) == alone

class Broken(in_processes.ProcessPoolExecutor):
    def submit(self, *args, **kwargs):
        raise in_processes.BrokenProcessPool("a process was killed while requests were handed out")

in_processes.ProcessPoolExecutor = Broken
assert simulated_remedies(asked, plan, processes=2) == alone
print("the same", len(alone))
"""


def test_plans_of_several_processes_are_those_of_one() -> None:
    """In the same order, refused ones left out, and also where a process is killed and its part is made up for."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("the same"), done.stderr
    assert in_processes.usable_processes() >= 1


def test_a_breakdown_can_be_sent() -> None:
    """Pickled and read again it is the same, and still cannot be written to."""
    entries = ordered_entries({EntryKey(Category.WEIGHTS, "trainable", "float32"): 8})
    breakdown = Breakdown(moment=Moment.PEAK, entries=entries, allocated_bytes=8, estimated=True)
    again = pickle.loads(pickle.dumps(breakdown))
    assert again == breakdown
    assert type(again.entries) is type(entries)
