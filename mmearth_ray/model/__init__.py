"""The model: one ConvNeXt V2 encoder that works on visible patches only, one shared decoder, heads from the table."""
