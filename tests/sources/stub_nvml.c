/*
 * A driver library for tests: the functions of libnvidia-ml.so.1 that memtrace asks for, answering from a text file.
 *
 * The file is named by the environment variable STUB_NVML and read again at each call, so that a test can change what
 * the driver says while a process runs. No file means no device. One `key value...` a line; `device` begins a device,
 * and the keys of a device are about the last one.
 *
 *   device UUID NAME...          total N   free N   used N   reserved N      (bytes)
 *   compute PID BYTES|na         graphics PID BYTES|na
 *   utilization PERCENT|na       power MILLIWATTS|na       temperature CELSIUS
 *   mig on                       this GPU is split into the instances below that name it
 *   instance_of UUID             this device is a MIG instance of that GPU
 *   refuse FUNCTION CODE         every call of that function returns the code (for all devices)
 *   fail_from N CODE             the N-th and all later calls of this process return the code
 *   hang FUNCTION                a call of that function returns only when the line is gone
 *
 * As in the driver, initialisations are counted, and calls outside of them or in a forked child that has not
 * initialised the library itself return NVML_ERROR_UNINITIALIZED. Three functions are for tests alone:
 * stub_references() is that count, stub_calls() the number of calls so far, stub_hanging() of those that hang now.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    ARGUMENT_VERSION_MISMATCH = 25,
};
enum { MAX_DEVICES = 8, MAX_PROCESSES = 16, TEXT = 96 };

typedef unsigned long long bytes_t;
typedef struct { unsigned pid; bytes_t bytes; } process_t;
typedef struct { int count; process_t listed[MAX_PROCESSES]; } processes_t;
typedef struct {
    char uuid[TEXT], name[TEXT], instance_of[TEXT];
    bytes_t total, free, used, reserved;
    processes_t compute, graphics;
    unsigned utilization, power, temperature, mig;
} device_t;
typedef struct { int count; device_t devices[MAX_DEVICES]; } machine_t;

/* The binding's structures: nvmlMemory_t, nvmlMemory_v2_t, nvmlProcessInfo_v2_t, nvmlUtilization_t. */
typedef struct { bytes_t total, free, used; } memory_v1_t;
typedef struct { unsigned version; bytes_t total, reserved, free, used; } memory_v2_t;
typedef struct { unsigned pid; bytes_t used; unsigned gpu_instance, compute_instance; } process_info_t;
typedef struct { unsigned gpu, memory; } utilization_t;

static int references;
static int calls;
static volatile int hanging;
static pid_t initialised_by;

static bytes_t number(const char *text) { return strcmp(text, "na") ? strtoull(text, NULL, 10) : ~0ULL; }

static void list(processes_t *processes, const char *pid, const char *bytes)
{
    if (processes->count < MAX_PROCESSES)
        processes->listed[processes->count++] = (process_t){(unsigned)atoi(pid), number(bytes)};
}

static void read_line(machine_t *machine, char *line, const char *function, int *code, int *hang)
{
    char key[TEXT] = "", first[TEXT] = "", rest[TEXT] = "";
    sscanf(line, "%95s %95s %95[^\n]", key, first, rest);
    if (!strcmp(key, "refuse") && !strcmp(first, function))
        *code = atoi(rest);
    if (!strcmp(key, "fail_from") && calls >= atoi(first))
        *code = atoi(rest);
    if (!strcmp(key, "hang") && !strcmp(first, function))
        *hang = 1;
    if (!strcmp(key, "device") && machine->count < MAX_DEVICES) {
        device_t *added = &machine->devices[machine->count++];
        memset(added, 0, sizeof *added);
        strcpy(added->uuid, first);
        strcpy(added->name, rest);
    }
    if (!machine->count)
        return;
    device_t *device = &machine->devices[machine->count - 1];
    if (!strcmp(key, "total")) device->total = number(first);
    if (!strcmp(key, "free")) device->free = number(first);
    if (!strcmp(key, "used")) device->used = number(first);
    if (!strcmp(key, "reserved")) device->reserved = number(first);
    if (!strcmp(key, "compute")) list(&device->compute, first, rest);
    if (!strcmp(key, "graphics")) list(&device->graphics, first, rest);
    if (!strcmp(key, "utilization")) device->utilization = (unsigned)number(first);
    if (!strcmp(key, "power")) device->power = (unsigned)number(first);
    if (!strcmp(key, "temperature")) device->temperature = (unsigned)number(first);
    if (!strcmp(key, "mig")) device->mig = !strcmp(first, "on");
    if (!strcmp(key, "instance_of")) strcpy(device->instance_of, first);
}

/* Reads the machine for one call of a function and returns what the file makes every such call return. */
static int ask(machine_t *machine, const char *function)
{
    int code, hang, hung = 0;
    calls++;
    do {
        const char *path = getenv("STUB_NVML");
        FILE *file = path ? fopen(path, "r") : NULL;
        char line[3 * TEXT];
        machine->count = code = hang = 0;
        while (file && fgets(line, sizeof line, file))
            read_line(machine, line, function, &code, &hang);
        if (file)
            fclose(file);
        hanging += hang - hung;
        hung = hang;
        if (hang)
            usleep(2000);
    } while (hang);
    if (!code && strcmp(function, "nvmlInitWithFlags") && (!references || initialised_by != getpid()))
        code = UNINITIALIZED;
    return code;
}

/* A handle is the number of a device in the file, from 1. */
static void *handle_of(int index) { return (void *)(long)(index + 1); }
static device_t *device_of(machine_t *machine, void *handle) { return &machine->devices[(long)handle - 1]; }

#define ASK(handle)                                   \
    static __thread machine_t machine;                \
    int code = ask(&machine, __func__);               \
    if (code)                                         \
        return code;                                  \
    if ((long)handle < 1 || (long)handle > machine.count) \
        return INVALID_ARGUMENT;                      \
    device_t *device = device_of(&machine, handle)

int stub_references(void) { return references; }
int stub_calls(void) { return calls; }
int stub_hanging(void) { return hanging; }

int nvmlInitWithFlags(unsigned flags)
{
    static __thread machine_t machine;
    int code = ask(&machine, __func__);
    (void)flags;
    if (!code) {
        references++;
        initialised_by = getpid();
    }
    return code;
}

int nvmlShutdown(void)
{
    calls++;
    if (!references)
        return UNINITIALIZED;
    references--;
    return SUCCESS;
}

const char *nvmlErrorString(int code)
{
    static __thread char text[TEXT];
    snprintf(text, sizeof text, "stub error %d", code);
    return text;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle)
{
    static __thread machine_t machine;
    int code = ask(&machine, __func__);
    if (code)
        return code;
    for (int i = 0; i < machine.count; i++)
        if (!strcmp(machine.devices[i].uuid, uuid)) {
            *handle = handle_of(i);
            return SUCCESS;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    static __thread machine_t machine;
    int code = ask(&machine, __func__);
    *count = 0;
    for (int i = 0; i < machine.count; i++)
        *count += !machine.devices[i].instance_of[0];
    return code;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle)
{
    static __thread machine_t machine;
    int code = ask(&machine, __func__);
    if (code)
        return code;
    for (int i = 0; i < machine.count; i++)
        if (!machine.devices[i].instance_of[0] && !index--) {
            *handle = handle_of(i);
            return SUCCESS;
        }
    return INVALID_ARGUMENT;
}

int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned length)
{
    ASK(handle);
    snprintf(uuid, length, "%s", device->uuid);
    return SUCCESS;
}

int nvmlDeviceGetName(void *handle, char *name, unsigned length)
{
    ASK(handle);
    snprintf(name, length, "%s", device->name);
    return SUCCESS;
}

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending)
{
    ASK(handle);
    if (device->instance_of[0])
        return NOT_SUPPORTED;
    *current = *pending = device->mig;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count)
{
    ASK(handle);
    (void)device;
    *count = MAX_DEVICES;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned slot, void **instance)
{
    ASK(handle);
    if (slot >= (unsigned)machine.count || strcmp(machine.devices[slot].instance_of, device->uuid))
        return NOT_FOUND;
    *instance = handle_of((int)slot);
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *handle, memory_v1_t *memory)
{
    ASK(handle);
    *memory = (memory_v1_t){device->total, device->free, device->used + device->reserved};
    return SUCCESS;
}

#ifndef WITHOUT_MEMORY_V2
int nvmlDeviceGetMemoryInfo_v2(void *handle, memory_v2_t *memory)
{
    ASK(handle);
    if (memory->version != (sizeof *memory | 2U << 24))
        return ARGUMENT_VERSION_MISMATCH;
    *memory = (memory_v2_t){memory->version, device->total, device->reserved, device->free, device->used};
    return SUCCESS;
}
#endif

/* Called once for the number of processes and once more with room for them. */
static int give(const processes_t *processes, unsigned *count, process_info_t *infos)
{
    unsigned room = infos ? *count : 0;
    *count = (unsigned)processes->count;
    if (room < *count)
        return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < *count; i++)
        infos[i] = (process_info_t){processes->listed[i].pid, processes->listed[i].bytes, ~0U, ~0U};
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, process_info_t *infos)
{
    ASK(handle);
    return give(&device->compute, count, infos);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *count, process_info_t *infos)
{
    ASK(handle);
    return give(&device->graphics, count, infos);
}

int nvmlDeviceGetUtilizationRates(void *handle, utilization_t *rates)
{
    ASK(handle);
    *rates = (utilization_t){device->utilization, 0};
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts)
{
    ASK(handle);
    *milliwatts = device->power;
    return SUCCESS;
}

int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *celsius)
{
    ASK(handle);
    (void)sensor;
    *celsius = device->temperature;
    return SUCCESS;
}
