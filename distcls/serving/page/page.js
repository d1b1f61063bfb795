<!doctype html><title>distcls</title>
