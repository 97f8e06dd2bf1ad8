"""What users import: the edges that wire a tracer to a training loop and to the exporters.

In come a framework's callbacks or a plain loop's model and optimizer. Out goes nothing: the tracer is attached, and
detached however the training ends. Must not know how a byte is attributed. A new framework is a file here, which
takes the settings of `TracerConfig` as keyword arguments.
"""
