/* A stand-in for NVML, the driver's library: two GPUs, of which the second does not tell its temperature or, as a part of one, how
   busy it is. */
#include <stdio.h>
#include <string.h>

typedef struct { unsigned gpu, memory; } rates;
typedef struct { unsigned long long total, free, used; } memory;
static int first, second;
static unsigned asked;

int nvmlInit_v2(void) { return 0; }

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    *handle = !strcmp(uuid, "GPU-aaaa") ? &first : !strcmp(uuid, "GPU-bbbb") ? &second : NULL;
    return *handle ? 0 : 6;
}

int nvmlDeviceGetUtilizationRates(void *handle, rates *found) {
    if (handle != &first) return 3;
    found->gpu = asked++ % 2 ? 100 : 50;
    found->memory = 7;
    return 0;
}

int nvmlDeviceGetMemoryInfo(void *handle, memory *found) {
    found->total = 80ull << 30;
    found->used = handle == &first ? 3ull << 30 : 5ull << 20;
    found->free = found->total - found->used;
    return 0;
}

int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) {
    *milliwatts = handle == &first ? 312500 : 70000;
    return 0;
}

int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *degrees) {
    if (handle != &first || sensor != 0) return 3;
    *degrees = 61;
    return 0;
}
