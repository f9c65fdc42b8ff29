#!/bin/sh
exec sh "$(dirname -- "$0")/../../../models/weights/download_darknet_weights.sh" "$@"
