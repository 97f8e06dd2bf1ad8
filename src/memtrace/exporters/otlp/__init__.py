"""OpenTelemetry: metrics pushed to a collector, while a run goes on or when it has ended.

In come snapshots, and records of which snapshots are made again. Out go the SDK's metrics, by HTTP. Must not hold up
the training thread, nor the end of a run for long. A new metric goes into the catalogue, another protocol into
`metrics`, as an exporter of the SDK.
"""
