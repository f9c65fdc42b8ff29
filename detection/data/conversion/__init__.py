"""COCO JSON, YOLO txt and Pascal VOC XML into one another."""
