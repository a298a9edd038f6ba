package main

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// What all may hold together is what --memory says, however little or much that is
// (fault H11).
func TestMemoryIsDealtOutWhole(t *testing.T) {
	for _, total := range []int64{leastMemory, 192 << 20, 512 << 20, mostMemory, 8 << 30} {
		budget, connections := nbdLimits(total)
		require.GreaterOrEqual(t, budget, int64(32<<20), "a request of the largest size")
		held := wireMemory + budget*5/2 + int64(connections)*connectionMemory
		require.LessOrEqual(t, held, total)
		require.Greater(t, held, total-total/8)
	}
	budget, connections := nbdLimits(mostMemory)
	require.EqualValues(t, 256<<20, budget)
	require.Equal(t, 1024, connections)
}
