"""The CPU as the device: machine, cgroups of both versions, and this very process."""

import os
from pathlib import Path

import psutil
import pytest

from memtrace.sources.devices.host import CpuDevice, Room, cgroup_rooms, parse_meminfo, parse_statm, tightest

MIB = 2**20
MEMINFO = "MemTotal:       16384 kB\nMemFree:         1024 kB\nMemAvailable:   12288 kB\nSwapTotal:  0 kB\n"


def write(directory: Path, files: dict[str, str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)


def version_2(directory: Path, limit: str, usage: int, cache: int = 0) -> None:
    stat = f"anon 1\ninactive_file {cache}\nactive_file 99\n"
    write(directory, {"memory.max": f"{limit}\n", "memory.current": f"{usage}\n", "memory.stat": stat})


def version_1(directory: Path, limit: int, usage: int, cache: int = 0) -> None:
    stat = f"inactive_file 5\ntotal_inactive_file {cache}\n"
    files = {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{usage}\n", "memory.stat": stat}
    write(directory, files)


class TestMachine:
    def test_meminfo(self) -> None:
        """The kernel writes kB and means KiB; free is what is available, not MemFree."""
        assert parse_meminfo(MEMINFO) == Room(16 * MIB, 12 * MIB)

    @pytest.mark.parametrize("text", ["", "MemTotal: many kB\n"])
    def test_meminfo_that_says_nothing(self, text: str) -> None:
        """No total, no room."""
        assert parse_meminfo(text) is None

    def test_statm(self) -> None:
        """The second number is the resident set in pages."""
        assert parse_statm("1000 250 30 1 0 200 0\n", 4096) == 250 * 4096
        assert parse_statm("", 4096) is None


class TestCgroups:
    def test_version_2(self, tmp_path: Path) -> None:
        """Limits of the process's group and of those above count; page cache that can go is free."""
        version_2(tmp_path / "jobs", "1000", usage=900, cache=300)
        version_2(tmp_path / "jobs/mine", "600", usage=100)
        assert list(cgroup_rooms("0::/jobs/mine\n", tmp_path)) == [Room(600, 500), Room(1000, 400)]

    def test_version_2_without_a_limit(self, tmp_path: Path) -> None:
        """`max` is no limit."""
        version_2(tmp_path / "mine", "max", usage=100)
        assert list(cgroup_rooms("0::/mine\n", tmp_path)) == []

    def test_version_1(self, tmp_path: Path) -> None:
        """The memory controller has a directory of its own, whatever else it is mounted with."""
        version_1(tmp_path / "memory/docker/mine", 600, usage=350, cache=50)
        membership = "9:name=systemd:/x\n4:cpuset,memory:/docker/mine\n0::/\n"
        assert list(cgroup_rooms(membership, tmp_path)) == [Room(600, 300)]

    def test_a_path_that_the_container_does_not_see(self, tmp_path: Path) -> None:
        """Where the host's path is not mounted, the root of the mount is the container's own group."""
        version_2(tmp_path, "600", usage=100)
        assert list(cgroup_rooms("0::/kubepods/pod1/abc\n", tmp_path)) == [Room(600, 500)]

    def test_usage_above_the_limit(self, tmp_path: Path) -> None:
        """A group above its limit has nothing free, not less than nothing."""
        version_2(tmp_path / "mine", "600", usage=700)
        assert list(cgroup_rooms("0::/mine\n", tmp_path)) == [Room(600, 0)]

    def test_usage_that_is_not_told(self, tmp_path: Path) -> None:
        """A limit without usage leaves open what is free."""
        write(tmp_path / "mine", {"memory.max": "600\n"})
        assert list(cgroup_rooms("0::/mine\n", tmp_path)) == [Room(600, None)]

    def test_text_that_is_no_membership(self, tmp_path: Path) -> None:
        """Lines of another form are skipped."""
        assert list(cgroup_rooms("\nnonsense\n1:2\n", tmp_path)) == []


class TestTightest:
    def test_the_lowest_limit_and_the_lowest_free(self) -> None:
        """A small group on a machine that is nearly full can have what the machine has left."""
        assert tightest([Room(1000, 50), Room(600, 500)]) == Room(600, 50)

    def test_a_limit_above_the_machine(self) -> None:
        """A limit that does not limit is not looked at."""
        assert tightest([Room(1000, 900), Room(2**63 - 4096, None)]) == Room(1000, 900)

    def test_free_that_is_not_known(self) -> None:
        """One unknown makes the lowest free unknown."""
        assert tightest([Room(1000, 900), Room(600, None)]) == Room(600, None)


class TestCpuDevice:
    def test_a_limited_process(self, tmp_path: Path) -> None:
        """Total and free are those of the cgroup, used is the rest, the process has its resident set."""
        version_2(tmp_path / "cgroup/mine", str(8 * MIB), usage=3 * MIB)
        write(tmp_path / "proc", {"meminfo": MEMINFO})
        write(tmp_path / "proc/self", {"cgroup": "0::/mine\n", "statm": "1000 250 30 1 0 200 0\n"})
        reading = CpuDevice(proc=tmp_path / "proc", cgroups=tmp_path / "cgroup").read()
        assert (reading.name, reading.uuid) == ("cpu", None)
        assert (reading.total_bytes, reading.used_bytes, reading.free_bytes) == (8 * MIB, 3 * MIB, 5 * MIB)
        assert reading.process_bytes == 250 * os.sysconf("SC_PAGE_SIZE")
        assert reading.other_processes_bytes is None

    def test_a_system_without_these_files(self, tmp_path: Path) -> None:
        """What nobody tells is None."""
        reading = CpuDevice(proc=tmp_path, cgroups=tmp_path).read()
        assert (reading.total_bytes, reading.free_bytes, reading.process_bytes) == (None, None, None)

    def test_this_machine(self) -> None:
        """On the real machine the parts add up, within what psutil knows of it."""
        reading = CpuDevice().read()
        assert reading.used_bytes + reading.free_bytes == reading.total_bytes
        assert 0 < reading.process_bytes < reading.total_bytes <= psutil.virtual_memory().total

    def test_this_process(self) -> None:
        """Memory that is written to shows in the resident set."""
        device = CpuDevice()
        before = device.read().process_bytes
        written = bytearray(b"1") * (64 * MIB)
        grown = device.read().process_bytes - before
        del written
        assert 60 * MIB < grown < 100 * MIB
