"""What models hold: weights, buffers, quantised forms, parts on the host, and further models beside the trained one.

In comes a module. Out go its tensors with their role. Must not know events. A new quantisation goes into `quantised`,
another place where models hide into `further`; those that objects of a framework refer to are found by `holders`.
"""
