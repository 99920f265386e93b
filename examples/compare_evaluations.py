"""Say whether a checkpoint is better than its base. Run evaluate_checkpoint.py first."""

from model_preparation import compare_evaluations

folders = ["example_output/evaluations/tiny_llamba", "example_output/evaluations/checkpoint"]
comparison = compare_evaluations(folders)
for row in comparison.rows:
    base, checkpoint = (score.mean for score in row.scores)
    print(f"{row.label}: {base:.3f} and {checkpoint:.3f}, p = {row.differences[0].p_value:.4f}")
