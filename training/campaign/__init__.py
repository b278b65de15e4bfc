"""Fault campaigns: small runs are disturbed and compared with one that is not. `scripts/campaign.py` runs them.

The files, in reading order:

- `config`: `CampaignConfig`, the keys of the command line. Imports no torch.
- `runs`: the runs that are disturbed, and their comparison with a run that is not.
- `worker`: what a worker process of such a run does.
- `processes`: the campaigns that start processes and disturb them.
- `damage`: the campaign that damages files, and reads them as a run does that continues.
- `driver`: runs the campaigns that the user has chosen, and prints the table.

docs/reliability.md is the user's page.
"""
