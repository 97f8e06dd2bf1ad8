"""The driver's answers, through the real pynvml and a driver library of ours."""

from pathlib import Path

import pytest
from stub_nvml import StubLibraries, StubProcess

A = "11111111-1111-1111-1111-111111111111"
B = "22222222-2222-2222-2222-222222222222"
C = "33333333-3333-3333-3333-333333333333"

MEMORY = "total 1000\nreserved 100\nfree 500\nused 400\n"
GPU = f"device GPU-{A} NVIDIA Stub 80GB\n{MEMORY}utilization 37\npower 250500\ntemperature 41\n"
READ = f"device = NvmlDevice('{A}'); result = fields(device.read()); device.close()"

NOT_AVAILABLE_CODES = {"not supported": 3, "no permission": 4, "lost": 15, "unknown": 999}
OF_PAIRS = {"non_torch_bytes", "free_and_reserved_bytes"}
"""What the sampler adds, which knows what the allocator had reserved."""
FIELDS_OF = {
    "nvmlDeviceGetMemoryInfo_v2": {"total_bytes", "used_bytes", "free_bytes", "driver_reserved_bytes"},
    "nvmlDeviceGetComputeRunningProcesses_v3": {"process_bytes", "other_processes_bytes"},
    "nvmlDeviceGetUtilizationRates": {"utilization_ratio"},
    "nvmlDeviceGetPowerUsage": {"power_watts"},
    "nvmlDeviceGetTemperature": {"temperature_celsius"},
    "nvmlDeviceGetName": {"name"},
}


@pytest.fixture
def host_proc(tmp_path: Path):
    """A process file system outside of containers, in which no process can be looked up."""
    return process_files(tmp_path / "proc", namespace="pid:[4026531836]")


def process_files(proc, *, namespace, pids=()):
    (proc / "self/ns").mkdir(parents=True)
    (proc / "self/ns/pid").symlink_to(namespace)
    for pid in pids:
        (proc / str(pid)).mkdir()
    return proc


def read_processes(driver: StubProcess, proc, listed: str) -> tuple[int | None, int | None]:
    driver.says(GPU + listed)
    reading = driver.run(
        f"device = NvmlDevice('{A}', proc=Path('{proc}')); result = fields(device.read()); device.close()"
    )
    return reading["process_bytes"], reading["other_processes_bytes"]


class TestReading:
    def test_a_full_answer(self, stub_driver: StubProcess) -> None:
        """Each field comes in its unit: bytes, a ratio, watts, degrees."""
        stub_driver.says(GPU)
        assert stub_driver.run(READ) == {
            "name": "NVIDIA Stub 80GB",
            "uuid": f"GPU-{A}",
            "total_bytes": 1000,
            "used_bytes": 400,
            "free_bytes": 500,
            "driver_reserved_bytes": 100,
            "process_bytes": None,
            "other_processes_bytes": None,
            "non_torch_bytes": None,
            "free_and_reserved_bytes": None,
            "utilization_ratio": 0.37,
            "power_watts": 250.5,
            "temperature_celsius": 41.0,
        }

    def test_memory_of_a_driver_that_counts_reserved_as_used(self, stub_driver: StubProcess) -> None:
        """Used, free and reserved add up to the total also where the driver's `used` holds the reserved part."""
        stub_driver.says(GPU.replace("used 400", "used 500"))
        assert stub_driver.run(READ)["used_bytes"] == 400

    def test_memory_of_an_old_driver(self, stub_libraries: StubLibraries, tmp_path: Path) -> None:
        """Without version 2 of the call, version 1 answers, and what is reserved is part of used."""
        process = StubProcess(stub_libraries.without_memory_v2, tmp_path / "says")
        process.says(GPU)
        reading = process.run(READ)
        process.close()
        memory = {name: reading[name] for name in FIELDS_OF["nvmlDeviceGetMemoryInfo_v2"]}
        assert memory == {"total_bytes": 1000, "free_bytes": 500, "used_bytes": 500, "driver_reserved_bytes": None}

    @pytest.mark.parametrize("code", NOT_AVAILABLE_CODES.values(), ids=NOT_AVAILABLE_CODES)
    @pytest.mark.parametrize("function", FIELDS_OF)
    def test_a_refused_call(self, stub_driver: StubProcess, host_proc: Path, function: str, code: int) -> None:
        """A call that is refused makes its own fields None and no other."""
        stub_driver.says(f"{GPU}compute {stub_driver.pid} 300\nrefuse {function} {code}\n")
        reading = stub_driver.run(
            f"device = NvmlDevice('{A}', proc=Path('{host_proc}')); result = fields(device.read()); device.close()"
        )
        assert {name for name, value in reading.items() if value is None} == FIELDS_OF[function] | OF_PAIRS

    def test_values_that_are_not_available(self, stub_driver: StubProcess) -> None:
        """A successful call that writes N/A is no number."""
        stub_driver.says(f"device GPU-{A} Stub\ntotal na\nfree na\nused na\nutilization na\npower na\ntemperature na\n")
        reading = stub_driver.run(READ)
        assert {name for name, value in reading.items() if value is not None} == {"name", "uuid"}

    def test_a_device_without_memory_of_its_own(self, stub_driver: StubProcess) -> None:
        """A total of 0 is no total."""
        stub_driver.says(f"device GPU-{A} Stub\n")
        assert stub_driver.run(READ)["total_bytes"] is None

    def test_a_device_that_is_lost_on_the_way(self, stub_driver: StubProcess) -> None:
        """From the fifth call of a reading on everything fails: what came before counts, nothing raises."""
        before, during, after = stub_driver.run(f"""
            says({GPU!r})
            device = NvmlDevice('{A}')
            result = [fields(device.read())]
            says({GPU!r} + f"fail_from {{calls() + 5}} 15\\n")
            result += [fields(device.read()), fields(device.read())]
            device.close()
        """)
        assert before["power_watts"] == 250.5
        assert (during["total_bytes"], during["power_watts"]) == (1000, None)
        assert {name for name, value in after.items() if value is not None} == {"name", "uuid"}


class TestWhichDevice:
    def test_the_order_of_the_driver_does_not_matter(self, stub_driver: StubProcess) -> None:
        """A device is found by UUID, wherever CUDA_VISIBLE_DEVICES puts it."""
        stub_driver.says(f"device GPU-{B} second\ntotal 2000\n{GPU}device GPU-{C} third\ntotal 3000\n")
        names = stub_driver.run(f"""
            devices = [NvmlDevice(uuid) for uuid in ("{C}", "{B}", "{A}")]
            result = [device.read().name for device in devices]
            for device in devices:
                device.close()
        """)
        assert names == ["third", "second", "NVIDIA Stub 80GB"]

    @pytest.mark.parametrize("uuid", [A, f"GPU-{A}"])
    def test_a_uuid_with_or_without_its_prefix(self, stub_driver: StubProcess, uuid: str) -> None:
        """torch leaves the prefix out, the driver wants it, the reading has it."""
        stub_driver.says(GPU)
        assert stub_driver.run(READ.replace(A, uuid))["uuid"] == f"GPU-{A}"

    @pytest.mark.parametrize("uuid", [B, f"MIG-{B}", f"GPU-{B}"])
    def test_a_mig_instance(self, stub_driver: StubProcess, uuid: str) -> None:
        """An instance is read through its own handle; it has memory but no utilisation."""
        instance = f"device MIG-{B} 1g.10gb\ninstance_of GPU-{A}\ntotal 120\nfree 20\nreserved 10\n"
        stub_driver.says(f"{GPU}mig on\n{instance}refuse nvmlDeviceGetUtilizationRates 3\n")
        reading = stub_driver.run(READ.replace(A, uuid))
        assert (reading["uuid"], reading["used_bytes"], reading["utilization_ratio"]) == (f"MIG-{B}", 90, None)

    def test_a_gpu_that_is_one_instance(self, stub_driver: StubProcess) -> None:
        """The UUID of a GPU in MIG mode stands for its only instance, never for the whole GPU."""
        stub_driver.says(f"{GPU}mig on\ndevice MIG-{B} 1g.10gb\ninstance_of GPU-{A}\ntotal 120\n")
        assert stub_driver.run(READ)["uuid"] == f"MIG-{B}"

    def test_a_gpu_that_is_several_instances(self, stub_driver: StubProcess) -> None:
        """Which of several instances is meant cannot be known."""
        instances = "".join(f"device MIG-{uuid} 1g.10gb\ninstance_of GPU-{A}\ntotal 120\n" for uuid in (B, C))
        stub_driver.says(f"{GPU}mig on\n{instances}")
        assert "MIG mode with 2 visible instances" in open_error(stub_driver)


class TestProcesses:
    def test_ours_and_the_others(self, stub_driver: StubProcess, host_proc: Path) -> None:
        """The others are those that compute and those that draw, each once."""
        listed = f"compute {stub_driver.pid} 300\ncompute 4242 50\ngraphics 4242 50\ngraphics 77 7\n"
        assert read_processes(stub_driver, host_proc, listed) == (300, 57)

    def test_ours_alone(self, stub_driver: StubProcess, host_proc: Path) -> None:
        """That nobody else is there is known: 0."""
        assert read_processes(stub_driver, host_proc, f"compute {stub_driver.pid} 300\n") == (300, 0)

    def test_a_device_that_cannot_draw(self, stub_driver: StubProcess, host_proc: Path) -> None:
        """A device that does not support the list of drawing processes has none."""
        listed = f"compute {stub_driver.pid} 300\nrefuse nvmlDeviceGetGraphicsRunningProcesses_v3 3\n"
        assert read_processes(stub_driver, host_proc, listed) == (300, 0)

    def test_drawing_processes_that_are_not_shown(self, stub_driver: StubProcess, host_proc: Path) -> None:
        """A list that is refused may have somebody on it."""
        listed = f"compute {stub_driver.pid} 300\nrefuse nvmlDeviceGetGraphicsRunningProcesses_v3 4\n"
        assert read_processes(stub_driver, host_proc, listed) == (300, None)

    def test_another_process_without_a_number(self, stub_driver: StubProcess, host_proc: Path) -> None:
        """One N/A among the others makes their sum unknown."""
        listed = f"compute {stub_driver.pid} 300\ncompute 4242 na\ncompute 4243 50\n"
        assert read_processes(stub_driver, host_proc, listed) == (300, None)

    @pytest.mark.parametrize("size", ["na", "0"])
    def test_ours_without_a_number(self, stub_driver: StubProcess, host_proc: Path, size: str) -> None:
        """Where the driver does not say what is ours, what is not ours is not known either."""
        listed = f"compute {stub_driver.pid} {size}\ncompute 4242 50\n"
        assert read_processes(stub_driver, host_proc, listed) == (None, None)

    def test_ours_is_not_listed(self, stub_driver: StubProcess, host_proc: Path) -> None:
        """Before the first use of CUDA, or under host pids, we are not on the list."""
        assert read_processes(stub_driver, host_proc, "compute 4242 50\n") == (None, None)

    def test_host_pids_in_a_container(self, stub_driver: StubProcess, tmp_path: Path) -> None:
        """A list with a process that does not exist here has the host's pids, and one may equal ours by chance."""
        proc = process_files(tmp_path / "proc", namespace="pid:[4026532001]", pids=[stub_driver.pid])
        listed = f"compute {stub_driver.pid} 300\ncompute 4242 50\n"
        assert read_processes(stub_driver, proc, listed) == (None, None)

    def test_own_pids_in_a_container(self, stub_driver: StubProcess, tmp_path: Path) -> None:
        """A driver that knows the container lists us there, and leaves out who is outside."""
        proc = process_files(tmp_path / "proc", namespace="pid:[4026532001]", pids=[stub_driver.pid])
        assert read_processes(stub_driver, proc, f"compute {stub_driver.pid} 300\n") == (300, None)


def open_error(process: StubProcess) -> str:
    """Returns the message of the DeviceUnavailable that opening device A raises."""
    return process.run(f"""
        try:
            NvmlDevice("{A}").close()
        except DeviceUnavailable as error:
            result = str(error)
    """)


class TestUnavailable:
    def test_no_driver_library(self, stub_libraries: StubLibraries, tmp_path: Path) -> None:
        """A library that cannot be loaded is named."""
        process = StubProcess(stub_libraries.broken, tmp_path / "says")
        message = open_error(process)
        process.close()
        assert message == "the NVIDIA driver cannot be asked: NVML Shared Library Not Found"

    def test_a_driver_that_is_not_loaded(self, stub_driver: StubProcess) -> None:
        """A library that finds no driver gives its reason."""
        stub_driver.says(f"{GPU}refuse nvmlInitWithFlags 9\n")
        assert open_error(stub_driver) == "the NVIDIA driver cannot be asked: Driver Not Loaded"

    def test_an_unknown_device(self, stub_driver: StubProcess) -> None:
        """The device that was asked for is named, and the library is left as it was found."""
        stub_driver.says(GPU.replace(A, B))
        assert open_error(stub_driver) == f"the NVIDIA driver does not give access to device {A}: Not Found"
        assert stub_driver.run("result = references()") == 0

    def test_a_device_without_permission(self, stub_driver: StubProcess) -> None:
        """A device that we may not open is not available."""
        stub_driver.says(f"{GPU}refuse nvmlDeviceGetHandleByUUID 4\n")
        assert "Insufficient Permissions" in open_error(stub_driver)


class TestInitialisation:
    def test_other_users_of_pynvml_keep_theirs(self, stub_driver: StubProcess) -> None:
        """Opening and closing (twice) leaves the count of somebody else, whose handle goes on working."""
        stub_driver.says(GPU)
        counts, total = stub_driver.run(f"""
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID("GPU-{A}")
            counts = [references()]
            device = NvmlDevice("{A}")
            counts.append(references())
            device.close()
            device.close()
            counts.append(references())
            result = counts, pynvml.nvmlDeviceGetMemoryInfo(handle).total
            pynvml.nvmlShutdown()
        """)
        assert counts == [1, 2, 1]
        assert total == 1000

    def test_a_forked_child_reads(self, stub_driver: StubProcess) -> None:
        """A child initialises the library itself, gives its own count back and leaves the parent's."""
        stub_driver.says(GPU)
        child, parent = stub_driver.run(f"""
            device = NvmlDevice("{A}")
            answers, answer = os.pipe()
            if (pid := os.fork()) == 0:
                seen = [device.read().total_bytes, references()]
                device.close()
                os.write(answer, json.dumps([*seen, references()]).encode())
                os._exit(0)
            os.waitpid(pid, 0)
            result = json.loads(os.read(answers, 1000)), [device.read().total_bytes, references()]
            device.close()
        """)
        assert child == [1000, 1, 0]
        assert parent == [1000, 1]

    def test_a_forked_child_without_a_driver(self, stub_driver: StubProcess) -> None:
        """A child that cannot open the device reads nothing but the UUID."""
        stub_driver.says(GPU)
        known = stub_driver.run(f"""
            device = NvmlDevice("{A}")
            answers, answer = os.pipe()
            if (pid := os.fork()) == 0:
                says("refuse nvmlInitWithFlags 9")
                known = [name for name, value in fields(device.read()).items() if value is not None]
                os.write(answer, json.dumps(known).encode())
                os._exit(0)
            os.waitpid(pid, 0)
            result = json.loads(os.read(answers, 1000))
            device.close()
        """)
        assert known == ["uuid"]

    def test_a_forked_child_only_closes(self, stub_driver: StubProcess) -> None:
        """A child that never reads makes no call of a library that may be locked there."""
        stub_driver.says(GPU)
        before, after = stub_driver.run(f"""
            device = NvmlDevice("{A}")
            answers, answer = os.pipe()
            if (pid := os.fork()) == 0:
                before = calls()
                device.close()
                os.write(answer, json.dumps([before, calls()]).encode())
                os._exit(0)
            os.waitpid(pid, 0)
            result = json.loads(os.read(answers, 1000))
            device.close()
        """)
        assert after == before

    def test_torch_is_not_asked(self, stub_libraries: StubLibraries, tmp_path: Path) -> None:
        """Opening and reading a device does not even load torch."""
        process = StubProcess(stub_libraries.current, tmp_path / "says")  # others have loaded torch in the shared one
        process.says(GPU)
        process.run(READ)
        assert process.run("result = 'torch' in sys.modules") is False
        process.close()


class TestListing:
    LIST = "from memtrace.sources.devices.nvml import device_uuids; result = device_uuids()"

    def test_gpus_are_listed_in_the_order_of_the_driver(self, stub_driver: StubProcess) -> None:
        """Instances of a GPU are not GPUs of their own."""
        stub_driver.says(f"{GPU}mig on\ndevice MIG-{C} slice\ninstance_of GPU-{A}\ndevice GPU-{B} other\n")
        assert stub_driver.run(self.LIST) == [f"GPU-{A}", f"GPU-{B}"]

    @pytest.mark.parametrize("function", ["nvmlInitWithFlags", "nvmlDeviceGetCount_v2", "nvmlDeviceGetUUID"])
    def test_a_driver_that_refuses_is_no_device(self, stub_driver: StubProcess, function: str) -> None:
        """Whichever call fails, the error is one, and the count of initialisations is given back."""
        stub_driver.says(f"{GPU}refuse {function} 999")
        caught = "try:\n    device_uuids()\nexcept DeviceUnavailable as error:\n    result = str(error)"
        message = stub_driver.run(f"from memtrace.sources.devices.nvml import device_uuids\n{caught}")
        assert "the NVIDIA driver" in message
