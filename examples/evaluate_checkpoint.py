"""Score a base and a checkpoint on the same questions. Run build_checkpoint.py first."""

from model_preparation import evaluate_checkpoint

for model in ("tiny_llamba", "example_output/checkpoint"):
    result = evaluate_checkpoint(
        model, tasks=["embedded_recall"], limit=20, batch_size=20, results_dir="example_output/evaluations"
    )
    print(f"{model}: {result['score']:.3f} on {result['questions']} questions")
