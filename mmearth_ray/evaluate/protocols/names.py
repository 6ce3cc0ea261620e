"""Names of the protocols, apart from what they need: options are read before anything heavy is loaded."""

FROZEN = ("knn", "logistic", "probe")
"""On features that are computed once: nearest neighbours, logistic (or ridge) regression, a linear layer by AdamW."""

TRAINED = ("decoder", "finetune")
"""On images: a head, or a UNet's decoder, on an encoder that rests, and all of it trained together."""

FINETUNE = TRAINED[1]
PROTOCOLS = (*FROZEN, *TRAINED)
USUAL = (*FROZEN, FINETUNE)

PLAIN = FROZEN[:2]
"""What statistics of bands are scored by, which are features but no encoder; neither draws anything."""

NORMALISATIONS = ("dataset", "pretraining")
"""Those of `feeding`, told here for the same reason."""

PRECISIONS = ("fp32", "bf16")
"""Of what is trained on images (TRAINED); features, and what is fitted to them, stay float32."""

MEANING = {
    "knn": "k nearest neighbours", "logistic": "logistic regression", "probe": "linear probe",
    "decoder": "head on the frozen encoder", "finetune": "fine-tuning",
}  # fmt: skip
"""What reports call them."""
