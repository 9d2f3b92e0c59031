"""Self-distillation: the teacher is the moving average of the student, so that no other network is trained.

python -m examples.distill_itself [--quick]
"""

import lightning as L

import lightning_accel as la
from examples.data import Images
from examples.models import ImageClassifier
from examples.options import is_quick


def main() -> None:
    """Train one network with labels and its own average; both can be used afterwards."""
    quick = is_quick(__doc__)
    L.seed_everything(1, verbose=False)
    images = Images("mnist", train=320 if quick else 4000, held_out=256 if quick else 1000)
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}

    module = la.DistillationModule(
        ImageClassifier(depth=8, width=8),
        la.teachers.EMATeacher(decay=0.99),
        losses=la.losses.StandardizedLoss(),
        alpha=la.Scheduled(0.0, 0.7, start=0.1, end=0.5),  # in the beginning the average has learned nothing
    )
    trainer = L.Trainer(max_epochs=1 if quick else 6, **settings)
    trainer.fit(module, images)
    for name, network in (("student", module.student), ("its average", module.teacher.network)):
        found = L.Trainer(**settings, enable_progress_bar=False).test(network, images, verbose=False)[0]
        print(f"{name}: {found['test_accuracy']:.1%} of {len(images.parts[1])} held-out images")


if __name__ == "__main__":
    main()
