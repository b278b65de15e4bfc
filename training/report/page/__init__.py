"""The report of a run or a sweep: one HTML file, which opens without a network.

The modules in reading order:

    gather          what the files of a run contain, and what is missing
    theme           colours and fonts of the figures, on light and on dark pages
    curves          the metrics over the steps
    figures         the loads of the experts
    heldout         the probe: text, domains, co-activation, churn
    jobs            the results of a sweep
    paper           the figures as PNG and SVG files
    write           the template, the script and the data become one file

`*.html.jinja`, `page.css` and `page.js` are the templates, their style, and the script that links the figures.
"""
