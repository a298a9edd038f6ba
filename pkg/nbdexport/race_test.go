//go:build race

package nbdexport

const raceEnabled = true
