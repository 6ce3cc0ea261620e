"""What a command says of images and patches, as IMAGE/PATCH in px."""

from mmearth_ray.errors import UsageError
from mmearth_ray.model.encoder import check_image_size, check_patch_size


def parse_shape(text: str, option: str = "shapes") -> tuple[int, int]:
    """Image and patch size in px.  Raises UsageError unless the image is whole patches of a size that the encoder takes."""
    image, slash, patch = text.partition("/")
    if not (slash and image.isdecimal() and patch.isdecimal()):
        raise UsageError(f"{option}={text}: must be IMAGE/PATCH in pixels, such as 112/16")
    try:
        check_patch_size(int(patch))
        check_image_size((int(image),), int(patch))
    except ValueError as error:
        raise UsageError(f"{option}={text}: {error}") from error
    return int(image), int(patch)
