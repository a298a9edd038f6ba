//go:build !race

package lazy

const slowdown = 1 // see race_test.go
