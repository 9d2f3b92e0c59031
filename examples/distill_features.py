"""Distill an image classifier from logits and feature maps, with a teacher that runs once per image.

python -m examples.distill_features [--quick]
"""

import lightning as L

import lightning_accel as la
from examples.data import Images
from examples.models import ImageClassifier
from examples.options import is_quick


def main() -> None:
    """Train a teacher, then the same small network with labels alone and with distillation."""
    quick = is_quick(__doc__)
    images = Images("mnist", train=320 if quick else 4000, held_out=256 if quick else 1000)
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    epochs = 1 if quick else 6

    L.seed_everything(1, verbose=False)
    teacher = ImageClassifier(depth=14, width=16)
    L.Trainer(max_epochs=epochs, **settings).fit(teacher, images)

    accuracies = {"teacher": teacher}
    for name in ("labels alone", "distilled"):
        L.seed_everything(2, verbose=False)
        module: L.LightningModule = ImageClassifier(depth=8, width=4)
        if name == "distilled":
            module = la.DistillationModule(
                module,
                teacher,
                losses=[
                    la.LossTerm("kd"),
                    # A trained 1x1 convolution, which is never exported, maps the student's 16 channels to the teacher's 64.
                    la.LossTerm("hint", 0.5, student_layer="net.body.2", teacher_layer="net.body.5"),
                ],
                alpha=la.Scheduled(0.9, 0.5),  # less distillation towards the end
                cache=la.TeacherCache(f"artifacts/distill_features_cache_{len(images.parts[0])}"),
            )
        L.Trainer(max_epochs=epochs, **settings).fit(module, images)
        accuracies[name] = module
    for name, module in accuracies.items():
        found = L.Trainer(**settings, enable_progress_bar=False).test(module, images, verbose=False)[0]
        parameters = sum(p.numel() for p in module.parameters())
        print(
            f"{name}: {found['test_accuracy']:.1%} of {len(images.parts[1])} held-out images, {parameters:,} parameters"
        )


if __name__ == "__main__":
    main()
