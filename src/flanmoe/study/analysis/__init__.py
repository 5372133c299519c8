"""From a table of scores to claims with verdicts; `analyse.analyse` is the way in."""
