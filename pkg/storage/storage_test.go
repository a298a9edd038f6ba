package storage

import (
	"math"
	"testing"
)

func TestCheckRangeTakesOnlyWhatLiesInside(t *testing.T) {
	for _, c := range []struct {
		off, length int64
		size        uint64
		inside      bool
	}{
		{0, 0, 0, true}, {0, 10, 10, true}, {10, 0, 10, true}, {9, 1, 10, true},
		{math.MaxInt64 - 1, 1, math.MaxInt64, true}, {math.MaxInt64, math.MaxInt64, math.MaxUint64, true},
		{0, 1, 0, false}, {0, 11, 10, false}, {10, 1, 10, false}, {11, 0, 10, false},
		{-1, 1, 10, false}, {0, -1, 10, false}, {math.MinInt64, 0, 10, false},
		{math.MaxInt64, 1, math.MaxInt64, false}, {1, math.MaxInt64, math.MaxInt64, false},
	} {
		err := CheckRange(c.off, c.length, c.size)
		if (err == nil) != c.inside {
			t.Errorf("[%d, +%d) of %d bytes: %v", c.off, c.length, c.size, err)
		}
	}
}
