"""Tasks as lm-eval runs them: ours by reference answers, ours with few-shot prompts, and its own."""
