"""What a run writes down and shows: metrics, trackers, progress, tables and plots. Only rank 0 uses it.

The modules in reading order:

    metrics         the rows of `metrics.jsonl`, and the router's metrics
    trackers        Weights & Biases and the trackers of plugins; the recorder, which forwards each row to
                    `metrics.jsonl`, the trackers and the progress
    terminal        lines, tables and the progress on stdout, numbers in a readable form
    tables          the tables at the start and at the end of a run
    heatmap         the expert load as a heatmap on stdout
    plots           the plots, as SVG and PNG files
    run_report      the start, the end and the `result.json` of a run, made from the modules above
    probe           the files of a probe, and what is computed from them
    sweep           the table and the plot of a sweep
    page            the report of a run, as an HTML file
"""
