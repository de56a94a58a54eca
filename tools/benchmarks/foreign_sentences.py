"""A few sentences in other languages, written for the planted corpus."""

FOREIGN = {
    "German": "Der Rat hat am Montag über die neue Brücke gesprochen. Viele Menschen warten schon lange auf eine "
    "bessere Verbindung. Niemand weiß genau, was sie kosten wird. Die Stadt will im nächsten Frühling mit "
    "den Arbeiten beginnen. Am Ufer soll außerdem ein Weg für Fahrräder entstehen. Einige Händler "
    "fürchten um ihre Parkplätze. Der Bürgermeister versprach, alle Fragen schriftlich zu beantworten. "
    "Danach gingen die meisten zufrieden nach Hause.",
    "French": "Le conseil a parlé lundi du nouveau pont. Beaucoup de gens attendent depuis longtemps une meilleure "
    "liaison. Personne ne sait exactement ce qu'il coûtera. La ville veut commencer les travaux au "
    "printemps prochain. Un chemin pour les vélos doit aussi longer la rive. Quelques commerçants "
    "craignent pour leurs places de parking. Le maire a promis de répondre par écrit à toutes les "
    "questions. Ensuite la plupart sont rentrés chez eux satisfaits.",
    "Spanish": "El consejo habló el lunes del nuevo puente. Mucha gente espera desde hace tiempo una conexión mejor. "
    "Nadie sabe exactamente cuánto costará. La ciudad quiere empezar las obras la próxima primavera. "
    "También habrá un camino para bicicletas junto a la orilla. Algunos comerciantes temen por sus "
    "aparcamientos. El alcalde prometió responder por escrito a todas las preguntas. Después la mayoría "
    "volvió contenta a su casa.",
    "Russian": "В понедельник совет обсуждал новый мост. Многие люди давно ждут более удобной дороги. Никто точно не "
    "знает, сколько он будет стоить. Город хочет начать работы следующей весной. Вдоль берега появится "
    "дорожка для велосипедов. Некоторые торговцы боятся за свои стоянки. Мэр обещал письменно ответить на "
    "все вопросы. После этого большинство довольными разошлись по домам.",
}
