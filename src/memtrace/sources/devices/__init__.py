"""What the driver and the operating system say of a device, and the thread that asks them.

In comes a torch device. Out go readings, each with its time; what nobody tells is absent. Must not call torch's CUDA
from the sampling thread. The reader of another kind of device goes into a file here, and its row into `readers`.
"""
