"""What users import: the edges that wire a tracer to a training loop and to the exporters."""
