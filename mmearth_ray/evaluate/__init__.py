"""What an encoder is worth: labelled data sets, frozen and fine-tuned protocols, label efficiency."""
