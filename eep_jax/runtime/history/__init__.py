"""Record of what happened, on disk and in reports. No JAX.

`journal`         records on disk, appended before they are acted upon
`journal_format`  their lines, with checksums, and the errors of a damaged file
`run_facts`       what of the configuration a run cannot change
`recovery`        from the journal to the previous state, and from a state to a short journal
`event_log`       journal, status, metrics and log from one call
`change_costs`    seconds and experts that each change of members cost
`status`          health and status
`metrics`         counts and gauges in Prometheus' text format
`problems`        sentences on what keeps the cluster from being whole
"""
