//go:build race

package lazy

// slowdown is how much slower the race detector makes a loop over words.
const slowdown = 20
