"""From a detector and a validation set to the official COCO numbers, and where they come from."""
