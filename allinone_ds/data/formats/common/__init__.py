"""What several formats share: class names, boxes, masks, lists of files."""
