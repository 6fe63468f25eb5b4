"""ImageNet's mean and standard deviation, by which nearly all published networks normalize."""

# Red, green and blue, in units of a pixel of range 0 to 1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
